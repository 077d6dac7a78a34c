"""DRAF: fusion by weights that fall with each modality's uncertainty (proposal DRAF, 3.2; spec 1.1 and 1.2).

From the proposal: MC-dropout backbones, U_m, r = softmax(-alpha U), H = sum r_m h_m, the corruption head. Ours: the masks for
absent modalities, separate unimodal heads, the other uncertainties and spaces, scaled, inverse and learned weights, the mc
prediction, presence bits. docs/models.md lists which option is which.
"""

import math
from typing import Literal, Self

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from draf_dist.config.spec import Spec
from draf_dist.models.backbones import Backbones
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.fusion.logits import Prediction, fused_logits
from draf_dist.models.layers import FusionHead, ModalityLinear
from draf_dist.models.link import link_of
from draf_dist.models.mc import name_streams
from draf_dist.models.reliability import inverse_logits, learned_logits, masked_softmax, relative_entropy, softmax_logits
from draf_dist.models.uncertainty import UncertaintyName, UncertaintySpace
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.modality import DataSchema

# Fewer passes than this can't be halved into two estimates of a variance.
_LEAST_TO_HALVE = 4


class DrafConfig(Spec):
    """Defaults are the proposal's where it is sound, and the spec's where it is not; see docs/models.md for each choice."""

    kind: Literal["draf"] = "draf"
    width: int = Field(64, ge=1)
    encoders: EncoderChoice = EncoderChoice()
    uni_head: Literal["shared", "separate"] = "separate"
    uncertainty: UncertaintyName = "epistemic"
    u_space: UncertaintySpace = "probability"
    reliability: Literal["softmax_u", "inverse", "learned"] = "softmax_u"
    alpha_mode: Literal["fixed", "scaled"] = "fixed"
    reliability_alpha: float = Field(1.0, ge=0)
    kappa: float = Field(1.0, ge=0)
    modality_prior: bool = False
    acd_gate: float = Field(0.0, ge=0)
    detach_r: bool = True
    u_ema: float | None = Field(None, gt=0, lt=1)
    predict: Prediction = "mc"
    presence_bits: bool = False

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.u_space == "logit" and self.uncertainty != "epistemic":
            raise ValueError(f"u_space logit has the epistemic uncertainty only, not {self.uncertainty}")
        if self.reliability == "learned" and self.acd_gate:
            raise ValueError("reliability learned learns its own weight of the corruption head; leave acd_gate at 0")
        if self.reliability != "softmax_u" and self.alpha_mode == "scaled":
            raise ValueError(f"alpha_mode scaled is for reliability softmax_u; {self.reliability} has no alpha")
        return self

    def build(self, schema: DataSchema) -> "Draf":
        """The model for one data schema.

        Raises:
            SpecError: an encoder does not fit its modality, or has no MC dropout.
        """
        model = Draf(self, schema)
        model.backbones.require_dropout(self.kind)
        name_streams(model)
        return model


class ReliabilityWeights(nn.Module):
    """From U and c_hat (B, M) to weights r (B, M): spec 1.1 rows 4, 5, 9, 12 and findings 2.

    Parameters, only where the configuration uses them, all starting at 0 (equal weights): prior b_m (M,), log_weight a,
    corruption_weight e. Buffers: u_scale s, the std of U on validation (1 until calibrated); running_u and running_weight (M,)
    for `u_ema`.
    """

    u_scale: Tensor
    running_u: Tensor
    running_weight: Tensor

    def __init__(self, config: DrafConfig, num_modalities: int) -> None:
        super().__init__()
        self.config = config
        learned = config.reliability == "learned"
        self.prior = nn.Parameter(torch.zeros(num_modalities)) if learned or config.modality_prior else None
        # With an axis: DeepSpeed can't send a parameter without one to the other ranks.
        self.log_weight = nn.Parameter(torch.zeros(1)) if learned else None
        self.corruption_weight = nn.Parameter(torch.zeros(1)) if learned else None
        self.register_buffer("u_scale", torch.ones(()))
        if config.u_ema is not None:
            self.register_buffer("running_u", torch.zeros(num_modalities))
            self.register_buffer("running_weight", torch.zeros(num_modalities))

    def forward(self, uncertainty: Tensor, corruption: Tensor, present: Tensor, weight: Tensor | None) -> Tensor:
        """Weights that sum to 1 over present and are exactly 0 elsewhere.

        weight: f32 (B,), leaves padding out of running means; None takes U as it is and moves none.
        """
        config = self.config
        corruption = corruption.detach() if config.detach_r else corruption
        if config.u_ema is not None and self.training and weight is not None:
            uncertainty = self.smooth(uncertainty, present, weight, config.u_ema)
        logits = self.logits(uncertainty, corruption)
        return masked_softmax(logits if self.prior is None else logits + self.prior, present)

    def logits(self, uncertainty: Tensor, corruption: Tensor) -> Tensor:
        """Log weights before the prior b_m and the softmax."""
        if self.log_weight is not None and self.corruption_weight is not None:
            return learned_logits(uncertainty, corruption, self.log_weight, self.corruption_weight)
        inverse = self.config.reliability == "inverse"
        logits = inverse_logits(uncertainty) if inverse else softmax_logits(uncertainty, self.alpha())
        return logits - self.config.acd_gate * corruption

    def alpha(self) -> Tensor | float:
        """Alpha as set, or kappa / s: at alpha = 1 and U <= 1/4 weights can hardly differ (row 4)."""
        return self.config.kappa / self.u_scale if self.config.alpha_mode == "scaled" else self.config.reliability_alpha

    @torch.no_grad()
    def smooth(self, uncertainty: Tensor, present: Tensor, weight: Tensor, decay: float) -> Tensor:
        """Each modality's running mean of U in place of the noisy estimates of a few passes (row 12); training only.

        The mean is over the global batch, so that ranks and world sizes agree, and is free of its starting value.
        """
        counts = present.to(weight.dtype) * weight.unsqueeze(1)
        sums = torch.stack([(counts * uncertainty).sum(0), counts.sum(0)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        seen = sums[1] > 0
        rate = torch.where(seen, 1 - decay, 0.0).to(self.running_u.dtype)
        self.running_u.lerp_(sums[0] / sums[1].clamp_min(1e-12), rate)
        self.running_weight.lerp_(torch.ones_like(rate), rate)
        return (self.running_u / self.running_weight.clamp_min(1e-12)).expand_as(uncertainty)


class Draf(nn.Module):
    """Parameters beside the backbones: g; M (d + 1) of the corruption head; M (dK + K) of separate unimodal heads.

    Buffers: log_prevalence (K,), the logits of the training split's shares (0 until set); those of ReliabilityWeights.
    """

    log_prevalence: Tensor

    def __init__(self, config: DrafConfig, schema: DataSchema) -> None:
        super().__init__()
        num_modalities, num_outputs = len(schema.modalities), schema.num_outputs
        self.link = link_of(schema.label)
        self.config = config
        self.backbones = Backbones(config.encoders, schema, config.width)
        bits = num_modalities if config.presence_bits else 0
        self.head = FusionHead(config.width, config.width, num_outputs, presence_bits=bits)
        separate = config.uni_head == "separate"
        self.modality_heads = ModalityLinear(num_modalities, config.width, num_outputs) if separate else None
        self.corruption_head = ModalityLinear(num_modalities, config.width, 1)
        self.weights = ReliabilityWeights(config, num_modalities)
        self.register_buffer("log_prevalence", torch.zeros(num_outputs))

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """Logits of S passes, weights, uncertainties and corruption logits of a normalised batch; keys int64 (S, B).

        signals: reliability_entropy, H(r) / log n: near 1 the weights do nothing (spec 1.1 row 4), near 0 they are saturated;
        reliability_noise: see `noise_of_weights`, from four passes on.
        """
        present = batch.present
        features = self.backbones(batch, keys)
        mean_features = features.mean(0)
        modality_logits = self.classify_each(features)
        corruption = torch.where(present, self.corruption_head(mean_features).squeeze(-1), 0.0)
        used = self.used_uncertainty(modality_logits, present)
        reliability = self.weights(used, corruption.sigmoid(), present, batch.weight)
        measured = self.link.uncertainties(modality_logits.detach())
        signals = {"reliability_entropy": relative_entropy(reliability.detach(), present)}
        if keys.shape[0] >= _LEAST_TO_HALVE:
            signals["reliability_noise"] = self.noise_of_weights(modality_logits, corruption.sigmoid(), present)
        return FusionOutput(
            logits=fused_logits(features, reliability, present, self.head, self.config.predict),
            reliability=reliability,
            uncertainty={name: torch.where(present, value, 0.0) for name, value in measured.items()} | {"used": used},
            features=mean_features,
            corruption_logits=corruption,
            # With the shared head the proposal trains no unimodal loss: there is nothing for an objective to take.
            modality_logits=None if self.modality_heads is None else modality_logits,
            signals=signals,
        )

    def classify_each(self, features: Tensor) -> Tensor:
        """Logits (S, B, M, K) from each modality alone: by its own head, or by g itself (the literal reading of row 1)."""
        logits: Tensor = self.head.classify(features) if self.modality_heads is None else self.modality_heads(features)
        return logits

    def used_uncertainty(self, modality_logits: Tensor, present: Tensor) -> Tensor:
        """The U (B, M) that the weights use, in the configured space, 0 where absent; without gradient if `detach_r`."""
        config = self.config
        uncertainty = self.link.uncertainty(config.u_space, config.uncertainty, modality_logits, self.log_prevalence)
        return torch.where(present, uncertainty.detach() if config.detach_r else uncertainty, 0.0)

    @torch.no_grad()
    def noise_of_weights(self, modality_logits: Tensor, corruption: Tensor, present: Tensor) -> Tensor:
        """The standard deviation of r if U were estimated again from as many other passes, mean over present m, (B,).

        U is a variance over S passes and is itself uncertain by about sqrt(2 / (S - 1)) (spec 1.1 row 12). Of the halves of the
        passes d = r' - r'' has four times the variance of r, and E|d| = 2 sigma sqrt(2 / pi). Without running means.
        """
        halves = modality_logits.chunk(2)
        # The module is called, not a method: ZeRO 3 has its parameters there only while it runs.
        first, second = (self.weights(self.used_uncertainty(half, present), corruption, present, None) for half in halves)
        count = present.sum(1).clamp_min(1)
        noise: Tensor = math.sqrt(math.pi / 8) * (first - second).abs().sum(1) / count
        return noise
