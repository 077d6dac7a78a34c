"""AUM: every modality a Gaussian, fused along a graph by attention that falls with its variance (spec 2; arXiv 2601.21950).

From the paper, as the spec has it: means and variances by MLPs, attention by inverse variance over a temperature, paths for
means and variances, the information bottleneck, the two stages. From MUSE, which it extends: the graph (aum_graph.py), dropped
edges and the contrastive pair. Ours: `precision`, `drop`, `mixture`, `exact`, modality nodes that no patient changes, presence
bits, clamps, which term reads what, and dropout that is on in evaluation too.

Two stages without a state. In the rows whose epoch is below `warm_epochs` the variances are there, and detached. So long as
there are only such rows, the variance MLPs have a gradient of exactly 0 (and have one: rules D1, D2), their last layers stay at
the 0 they began with, every variance is exactly 1, and attention exactly 1 / n. That is the paper's freezing: Adam moves nothing
on a zero gradient, and leaves stage 1 with moments of 0, as if they had been reset at the switch; an optimizer of several
parameter groups, a flag or a change of requires_grad, none of which ZeRO likes, would be needed otherwise. It differs in two
things. Weight decay shrinks the first layers of these MLPs by (1 - lr wd) a step all the while (the last ones are 0).
And Adam's step count has gone on: its moments are no longer corrected for having begun at 0, so after the switch an update is
longer than a fresh Adam's, 3.2 times at first, 6.6 times at most (step 12) and more than twice for some 290 steps. A model that
goes on from trained weights has other variances than 1 in its stage 1; they are held, not undone.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist import noise
from draf_dist.config.spec import Spec
from draf_dist.models.absent import mask_absent
from draf_dist.models.aum_graph import (
    Edges,
    ModalityNodeUpdate,
    PatientGraph,
    Patients,
    ReluMoments,
    VarianceRule,
    inverse_logits,
    precision_logits,
)
from draf_dist.models.backbones import Backbones
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.gaussian import Gaussian, kl_to_standard
from draf_dist.models.layers import FusionHead, ModalityLinear
from draf_dist.models.mc import name_streams
from draf_dist.models.uncertainty import entropy
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.modality import DataSchema

# Of log v: 1 / v is unbounded otherwise, and attention saturates (spec 2.3, 2.4.1).
LARGEST_LOG_VARIANCE = 7.0
# The temperature that the contrastive term begins with (MUSE).
START_TAU = 0.07


class AumConfig(Spec):
    """Defaults are the spec's; docs/models.md says which option is the paper's. width: d.

    theta: the temperature of `softmax_inv`; `precision` has none. warm_epochs: of stage 1. dropout: of patients, between layers.
    """

    kind: Literal["aum"] = "aum"
    width: int = Field(64, ge=1)
    encoders: EncoderChoice = EncoderChoice()
    num_layers: int = Field(2, ge=1)
    attention: Literal["softmax_inv", "precision"] = "softmax_inv"
    theta: float = Field(1.0, gt=0)
    missing: Literal["drop", "high_var"] = "drop"
    var_rule: VarianceRule = "independent"
    relu_moments: ReluMoments = "ignored"
    modality_node_update: ModalityNodeUpdate = "none"
    warm_epochs: int = Field(20, ge=0)
    dropout: float = Field(0.25, ge=0, lt=1)
    presence_bits: bool = False

    def build(self, schema: DataSchema) -> "Aum":
        """The model for one data schema.

        Raises:
            SpecError: an encoder does not fit its modality.
        """
        model = Aum(self, schema)
        name_streams(model)
        return model


class GaussianHeads(nn.Module):
    """What each modality's features say: mu = MLP_mu(x), v = exp(clamp(MLP_v(x), -7, 7)); M (4 d^2 + 4 d) parameters.

    The last layer of MLP_v begins at 0, so that v = 1 exactly. Each MLP is Linear - ReLU - Linear, d wide.
    """

    def __init__(self, num_modalities: int, width: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(*_layers(num_modalities, width))
        self.log_variance = nn.Sequential(*_layers(num_modalities, width))
        for parameter in self.log_variance[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (S, B, M, Z) to mu and log v of the same shape."""
        log_variance: Tensor = self.log_variance(features)
        return self.mean(features), log_variance.clamp(-LARGEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE)


class ContrastHead(nn.Module):
    """u = tanh(W z) / |tanh(W z)|, as MUSE compares patients, times the root of the scale of similarities.

    log_scale: log(1 / tau), learned. It is part of the embeddings, so that similarities are plain products of embeddings and the
    loss over the global batch, which is computed apart, has no parameter of its own (see CoupledObjective).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        # Not a scalar: DeepSpeed can't broadcast one.
        self.log_scale = nn.Parameter(-torch.tensor([START_TAU]).log())

    def forward(self, node: Tensor) -> Tensor:
        """Means (..., Z) of patients' nodes to embeddings (..., Z) of length exp(log_scale / 2)."""
        return functional.normalize(self.linear(node).tanh(), dim=-1) * (self.log_scale / 2).exp()


class Aum(nn.Module):
    """Passes are draws of dropout (of encoders and between layers); in training also of z ~ N(mean, var), the bottleneck's noise.

    In evaluation z = mean: the spread of passes is then that of MC dropout alone, epistemic, and the variances are given as such.

    parts: kl (B,); first, second (B, Z): embeddings of the first pass, with all edges and with some dropped.
    """

    def __init__(self, config: AumConfig, schema: DataSchema) -> None:
        super().__init__()
        num_modalities, width = len(schema.modalities), config.width
        self.config = config
        self.backbones = Backbones(config.encoders, schema, width)
        self.gaussians = GaussianHeads(num_modalities, width)
        self.graph = PatientGraph(
            num_modalities,
            width,
            config.num_layers,
            nodes=config.modality_node_update,
            var_rule=config.var_rule,
            relu=config.relu_moments,
            dropout=config.dropout,
        )
        self.head = FusionHead(width, width, schema.num_outputs, presence_bits=num_modalities if config.presence_bits else 0)
        self.contrast = ContrastHead(width)

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """Logits of S passes of a normalised batch; keys int64 (S, B)."""
        present = batch.present
        mean, log_variance = self.gaussians(self.backbones(batch, keys))
        value = Gaussian(mean, self.stage(log_variance.exp(), batch.epoch))
        edges = self.edges(value, present, batch.weight)
        patients: Patients = self.graph(edges, keys)
        fewer = self.edges(Gaussian(mean[:1], value.variance[:1]), dropped(present, keys[0]), batch.weight)
        second: Patients = self.graph(fewer, noise.chain(keys[:1], "aum_second_view"))
        return FusionOutput(
            logits=self.head(self.drawn(patients.node, keys), present),
            reliability=_over(edges.attention.mean(0), present),
            uncertainty=readings(value.variance, edges.attention, patients.messages, present),
            features=mask_absent(mean, present).mean(0),
            parts={
                "kl": kl_to_standard(patients.node).mean(0),
                "first": self.contrast(patients.node.mean[0]),
                "second": self.contrast(second.node.mean[0]),
            },
            signals=_signals(log_variance.detach(), edges, patients.messages, present),
        )

    def stage(self, variance: Tensor, epoch: Tensor) -> Tensor:
        """The variances (S, B, M, Z), detached in the rows of stage 1; epoch int64 (B,)."""
        warm = (epoch < self.config.warm_epochs).view(1, -1, 1, 1)
        return torch.where(warm, variance.detach(), variance)

    def edges(self, value: Gaussian, present: Tensor, weight: Tensor) -> Edges:
        """The edges of what is present. `high_var` (AUM): of everything, and what is absent is N(0, largest v)."""
        exists = present
        if self.config.missing == "high_var":
            there = present.unsqueeze(-1)
            largest = torch.tensor(LARGEST_LOG_VARIANCE, device=present.device).exp()
            value = Gaussian(torch.where(there, value.mean, 0.0), torch.where(there, value.variance, largest))
            exists = torch.ones_like(present)
        uncertainty = value.variance.mean(-1)
        literal = self.config.attention == "softmax_inv"
        logits = inverse_logits(uncertainty, self.config.theta) if literal else precision_logits(uncertainty)
        return Edges(value, logits, exists, weight > 0)

    def drawn(self, node: Gaussian, keys: Tensor) -> Tensor:
        """Z (S, B, Z): mean + sqrt(var) eps in training, one eps a pass and study; the mean in evaluation."""
        if not self.training:
            return node.mean
        eps = noise.normal(noise.chain(keys, "aum_latent"), (node.mean.shape[-1],))
        return node.mean + node.variance.sqrt() * eps


def dropped(present: Tensor, keys: Tensor) -> Tensor:
    """Present (B, M) with edges dropped, as a pure function of keys int64 (B,).

    MUSE's second view: a patient loses edges with probability 1/2, and then keeps a uniform number in [1, n - 1] of its n; with
    n = 1 it loses none.
    """
    rows, modalities = present.shape
    uniform = noise.uniform(noise.chain(keys, "aum_edge_drop"), (modalities + 2,))
    count = present.sum(1)
    fewer = 1 + (uniform[:, 1] * (count - 1)).long()
    kept = torch.where((uniform[:, 0] < 0.5) & (count > 1), fewer, count)
    order = torch.where(present, uniform[:, 2:], 2.0).argsort(dim=1, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(modalities, device=order.device).expand(rows, -1))
    return present & (place < kept.unsqueeze(1))


def readings(variance: Tensor, attention: Tensor, messages: Gaussian, present: Tensor) -> dict[str, Tensor]:
    """What is uncertain of every modality, (B, M), 0 where absent; means over passes and components.

    variance: u_m, that of its own Gaussian. independent and mixture: its share of the variance that its messages bring to the
    patient by either rule, a_m^2 v_m and a_m (v_m + (mu_m - mean)^2), whatever rule the model goes by. Their sums over modalities
    are the variances of spec 2.4.3, of which the first is no predictive uncertainty. (With `high_var`, those of absent ones aside.)
    """
    with torch.no_grad():
        weight = attention.unsqueeze(-1)
        mean = (weight * messages.mean).sum(-2, keepdim=True)
        parts = {
            "variance": variance,
            "independent": weight.square() * messages.variance,
            "mixture": weight * (messages.variance + (messages.mean - mean).square()),
        }
        return {name: torch.where(present, part.mean((0, -1)), 0.0) for name, part in parts.items()}


def _signals(log_variance: Tensor, edges: Edges, messages: Gaussian, present: Tensor) -> dict[str, Tensor]:
    """The two ways in which AUM fails: variances that collapse or never differ, attention that saturates or stays uniform.

    attention_entropy: H(a) / log n, 1 where it is uniform and 0 where it is one-hot; 1 where there is one edge. log_variance and
    log_variance_spread: mean and standard deviation of log v over present modalities and components. absent_attention: the
    weight of what is absent, above 0 with `high_var` alone. independent, mixture: variance of what arrives, by either rule.
    """
    attention = edges.attention.detach()
    count = edges.exists.sum(1)
    share = torch.where(count > 1, entropy(attention).mean(0) / count.clamp_min(2).log(), 1.0)
    mean, spread = _mean_and_spread(log_variance, present)
    both = readings(messages.variance, attention, messages, edges.exists)
    return {
        "attention_entropy": share,
        "log_variance": mean,
        "log_variance_spread": spread,
        "absent_attention": torch.where(present, 0.0, attention.mean(0)).sum(1),
        "independent": both["independent"].sum(1),
        "mixture": both["mixture"].sum(1),
    }


def _mean_and_spread(values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B,) of values (S, B, M, Z) over all but rows, what is absent left out."""
    count = present.sum(1) * values.shape[0] * values.shape[-1]
    mean = mask_absent(values, present).sum((0, 2, 3)) / count
    centred = mask_absent(values - mean.view(1, -1, 1, 1), present)
    return mean, (centred.square().sum((0, 2, 3)) / count).sqrt()


def _over(attention: Tensor, present: Tensor) -> Tensor:
    """Attention (B, M) as weights of what is present alone."""
    kept = torch.where(present, attention, 0.0)
    return kept / kept.sum(1, keepdim=True)


def _layers(num_modalities: int, width: int) -> tuple[nn.Module, ...]:
    return ModalityLinear(num_modalities, width, width), nn.ReLU(), ModalityLinear(num_modalities, width, width)
