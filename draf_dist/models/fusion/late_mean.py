"""Late fusion: one net per modality, trained alone; their probabilities are averaged over the present ones (spec 4.2)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.models.backbones import Backbones
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.layers import ModalityLinear, PresenceBits
from draf_dist.models.link import Link, link_of
from draf_dist.models.mc import name_streams
from draf_dist.models.reliability import equal_weights, fuse
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.modality import DataSchema


class LateMeanConfig(Spec):
    """How the nets' predictions are combined; presence_bits adds B0 P to the fused logits, and only it learns from them."""

    kind: Literal["late_mean"] = "late_mean"
    width: int = Field(64, ge=1)
    encoders: EncoderChoice = EncoderChoice()
    combine: Literal["mean", "vote"] = "mean"
    presence_bits: bool = False

    def build(self, schema: DataSchema) -> "LateMean":
        """The model for one data schema.

        Raises:
            SpecError: an encoder does not fit its modality.
        """
        model = LateMean(self, schema)
        name_streams(model)
        return model


class LateMean(nn.Module):
    """M nets without a shared parameter. Only the unimodal losses train them: the fused logits carry no gradient to them.

    mean: logits are log mean_m p_m, whose softmax is the mean of the probabilities (not the softmax of the mean of logits).
    vote: logits are the log of the vote shares, the same in all passes; they take at most n + 1 levels, so AUROC is coarse.
    """

    def __init__(self, config: LateMeanConfig, schema: DataSchema) -> None:
        super().__init__()
        self.config = config
        num_modalities, num_outputs = len(schema.modalities), schema.num_outputs
        self.link = link_of(schema.label)
        self.backbones = Backbones(config.encoders, schema, config.width)
        self.modality_heads = ModalityLinear(num_modalities, config.width, num_outputs)
        self.bits = PresenceBits(num_modalities, num_outputs) if config.presence_bits else None

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """Logits of S passes of a normalised batch; keys int64 (S, B)."""
        features = self.backbones(batch, keys)
        modality_logits = self.modality_heads(features)
        alone = modality_logits.detach()
        logits = self.link.logits(self.combined(self.link.probability(alone), batch.present))
        measured = self.link.uncertainties(alone)
        return FusionOutput(
            logits=logits if self.bits is None else logits + self.bits(batch.present),
            reliability=equal_weights(batch.present),
            uncertainty={name: torch.where(batch.present, value, 0.0) for name, value in measured.items()},
            features=features.mean(0),
            modality_logits=modality_logits,
        )

    def combined(self, probability: Tensor, present: Tensor) -> Tensor:
        """Fused probabilities (S, B, K) of each modality's (S, B, M, K)."""
        if self.config.combine == "mean":
            return mean_probability(probability, present)
        return vote_probability(probability.mean(0), present, self.link).expand(probability.shape[0], -1, -1)


def mean_probability(probability: Tensor, present: Tensor) -> Tensor:
    """Mean over the present modalities, from (..., B, M, K) and (B, M) to (..., B, K)."""
    return fuse(probability, equal_weights(present).to(probability.dtype))


def vote_share(probability: Tensor, present: Tensor, link: Link) -> Tensor:
    """Share of the present modalities that put each class first, or say yes to each question, from (B, M, K) to (B, K)."""
    said = functional.one_hot(probability.argmax(-1), probability.shape[-1]) if link.exclusive else probability > 0.5
    return mean_probability(said.to(probability.dtype), present)


def vote_probability(probability: Tensor, present: Tensor, link: Link) -> Tensor:
    """Vote shares clipped to [1e-3, 1 - 1e-3] for the NLL; the mean probability breaks ties (spec 4.2)."""
    # Shares differ by at least 1 / M, so a ten-thousandth of the mean can only decide between equal ones.
    scores = vote_share(probability, present, link).clamp(1e-3, 1 - 1e-3) + 1e-4 * mean_probability(probability, present)
    return scores / scores.sum(-1, keepdim=True) if link.exclusive else scores
