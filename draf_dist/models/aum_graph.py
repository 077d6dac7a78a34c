"""AUM's graph: patients, modalities, and a Gaussian edge wherever a patient has a modality (spec 2.2, 2.3).

From MUSE: nodes, messages, updates and edge updates, in this order and with these parameters. From AUM: edges are Gaussians,
their attention falls with their variance, means and variances travel on paths of their own. Ours: attention is computed once,
from the variances that the modalities' own data gave, and serves every layer; one attribute an edge, whichever way a message
goes; dropout between layers acts on patients alone, since only they have keys.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.models.gaussian import Gaussian, GaussianLinear, independent_variance, mixture_variance, relu_moments
from draf_dist.models.mc import MCDropout
from draf_dist.models.over_ranks import maximum_over_ranks, sum_over_ranks
from draf_dist.models.reliability import masked_softmax

ModalityNodeUpdate = Literal["none", "sync", "batch"]
VarianceRule = Literal["independent", "mixture"]
ReluMoments = Literal["ignored", "exact"]

# exp(-80) is the least weight of an edge: a saturated one is next to 0, and still the weight of something present.
_LOWEST = 80.0
# Of the literal attention's 1 / (u + eps), which is unbounded otherwise (spec 2.3).
EPS = 1e-3


@dataclass(frozen=True)
class Edges:
    """value: (S, B, M, Z). logits: (S, B, M), whose softmax is attention. exists: bool (B, M). counted: bool (B,), no padding."""

    value: Gaussian
    logits: Tensor
    exists: Tensor
    counted: Tensor

    @property
    def attention(self) -> Tensor:
        """Weights (S, B, M) of every patient's edges: they sum to 1, and are exactly 0 where there is none."""
        highest = self.logits.masked_fill(~self.exists, torch.finfo(self.logits.dtype).min).amax(-1, keepdim=True)
        return masked_softmax(self.logits.maximum(highest - _LOWEST), self.exists)


@dataclass(frozen=True)
class Patients:
    """node: of every patient, (S, B, Z). messages: what its edges said in the first layer, (S, B, M, Z)."""

    node: Gaussian
    messages: Gaussian


def inverse_logits(uncertainty: Tensor, theta: float, eps: float = EPS) -> Tensor:
    """(1 / (u + eps)) / theta, whose softmax is AUM's attention (its eq. 3): unbounded as u falls (spec 2.4.1)."""
    return 1 / (uncertainty + eps) / theta


def precision_logits(uncertainty: Tensor) -> Tensor:
    """-log u, whose softmax is (1 / u_e) / sum 1 / u: of all weights those with the least variance; free of scale [ours]."""
    return -uncertainty.log()


class ModalityNodes(nn.Module):
    """M learned nodes, N(0, 1) at first. A module, because ZeRO 3 gathers parameters for a module whose output is a tensor."""

    def __init__(self, num_modalities: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_modalities, width))

    def forward(self) -> Tensor:
        """The nodes, (1, 1, M, Z)."""
        return self.weight[None, None]


class PatientGraph(nn.Module):
    """L layers over M learned modality nodes N(0, 1) and patient nodes that begin as ones, with variance 0.

    message  m_e = phi(W_m [n_m || e])               arrived  sum_e a_e m_e
    update   x_i' = phi(W_u [arrived || x_i])        between layers  dropout, e' = phi(W_e [x_i' || n_m' || e])

    phi = ReLU. variance of what arrived: `var_rule`, gaussian.py; of updates: (W * W) times the variance, plus a floor.
    relu: `ignored` (AUM): phi and W_m act on means alone and a message's variance is that of its edge. `exact`: the variance of a
    message is that of W_m's output, and every phi gives the moments of a rectified Gaussian, to the means too.

    Modality nodes: `none`: as learned, in all layers; no patient ever sees another. `batch` (MUSE): updated by the patients of
    this process's batch, so that from the second layer on patients depend on their neighbours (rule D4). `sync`: by those of all
    ranks, the same for any number of ranks; every rank then calls forward and backward equally often.
    """

    def __init__(
        self,
        num_modalities: int,
        width: int,
        num_layers: int,
        *,
        nodes: ModalityNodeUpdate,
        var_rule: VarianceRule,
        relu: ReluMoments,
        dropout: float,
    ) -> None:
        super().__init__()
        self.nodes, self.var_rule, self.relu = nodes, var_rule, relu
        self.modality_nodes = ModalityNodes(num_modalities, width)
        sends = GaussianLinear if relu == "exact" else nn.Linear
        self.message = nn.ModuleList(sends(2 * width, width) for _ in range(num_layers))
        self.update = nn.ModuleList(GaussianLinear(2 * width, width) for _ in range(num_layers))
        self.edge_update = nn.ModuleList(GaussianLinear(3 * width, width) for _ in range(num_layers - 1))
        self.dropout = nn.ModuleList(MCDropout(dropout) for _ in range(num_layers - 1))

    def forward(self, edges: Edges, keys: Tensor) -> Patients:
        """The patients' nodes after the last layer; keys int64 (S, B)."""
        attention, value = edges.attention, edges.value
        modalities = _certain(self.modality_nodes())
        patients = _certain(torch.ones_like(value.mean[:1, :, 0]))
        first = messages = self._sent(0, modalities, value)
        for layer, dropout in enumerate(self.dropout):
            moved = self._updated(layer, _arrived(attention, messages, self.var_rule), patients)
            # Both at once: modalities hear of the patients as those were before they moved.
            modalities = self._heard(layer, modalities, patients, edges, value)
            patients = _scaled(moved, dropout(torch.ones_like(moved.mean[:1]), keys))
            value = self._through(self.edge_update[layer], _to_edges(patients), modalities, value)
            messages = self._sent(layer + 1, modalities, value)
        last = len(self.update) - 1
        return Patients(self._updated(last, _arrived(attention, messages, self.var_rule), patients), first)

    def _through(self, layer: nn.Module, *parts: Gaussian) -> Gaussian:
        """phi(W [parts] + b)."""
        value = Gaussian(*layer(*_beside(*parts)))
        return relu_moments(value) if self.relu == "exact" else Gaussian(value.mean.relu(), value.variance)

    def _sent(self, layer: int, sender: Gaussian, value: Gaussian) -> Gaussian:
        """The message of every edge, (S, B, M, Z), from the node at one of its ends."""
        mean, variance = _beside(sender, value)
        if self.relu == "exact":
            return relu_moments(Gaussian(*self.message[layer](mean, variance)))
        return Gaussian(self.message[layer](mean).relu(), value.variance)

    def _updated(self, layer: int, arrived: Gaussian, node: Gaussian) -> Gaussian:
        return self._through(self.update[layer], arrived, node)

    def _heard(self, layer: int, modalities: Gaussian, patients: Gaussian, edges: Edges, value: Gaussian) -> Gaussian:
        """The modality nodes, (S, 1, M, Z), after the patients have spoken to them."""
        if self.nodes == "none":
            return modalities
        messages = self._sent(layer, _to_edges(patients), value)
        exists = edges.exists & edges.counted[:, None]
        arrived = _arrived_at_modalities(edges.logits, exists, messages, self.var_rule, every_rank=self.nodes == "sync")
        return self._updated(layer, arrived, modalities)


def _certain(mean: Tensor) -> Gaussian:
    return Gaussian(mean, torch.zeros_like(mean))


def _to_edges(patients: Gaussian) -> Gaussian:
    """(S, B, Z) to (S, B, 1, Z)."""
    return Gaussian(patients.mean.unsqueeze(2), patients.variance.unsqueeze(2))


def _beside(*parts: Gaussian) -> tuple[Tensor, Tensor]:
    """Means side by side on the last axis, and variances, with all other axes broadcast."""
    shape = torch.broadcast_shapes(*(part.mean.shape for part in parts))  # type: ignore[no-untyped-call]
    means, variances = ([getattr(part, moment).expand(shape) for part in parts] for moment in ("mean", "variance"))
    return torch.cat(means, -1), torch.cat(variances, -1)


def _scaled(value: Gaussian, factor: Tensor) -> Gaussian:
    """What dropout leaves: a factor that is known is a linear map."""
    return Gaussian(value.mean * factor, value.variance * factor.square())


def _arrived(attention: Tensor, messages: Gaussian, rule: VarianceRule) -> Gaussian:
    """What patients hear: attention (S, B, M) over messages (S, B, M, Z), to (S, B, Z)."""
    mean = (attention.unsqueeze(-1) * messages.mean).sum(-2)
    if rule == "mixture":
        return Gaussian(mean, mixture_variance(attention, messages))
    return Gaussian(mean, independent_variance(attention, messages.variance))


def _arrived_at_modalities(logits: Tensor, exists: Tensor, messages: Gaussian, rule: VarianceRule, *, every_rank: bool) -> Gaussian:
    """What modalities hear: the same over the rows where the edge exists, to (S, 1, M, Z); zeros where no row has one.

    In sums, of which those of all ranks can be added: one collective, and one for the largest logit.
    """
    lowest = torch.finfo(logits.dtype).min
    # One row more: a rank may have none.
    highest = functional.pad(logits.detach().masked_fill(~exists, lowest), (0, 0, 0, 1), value=lowest).amax(1, keepdim=True)
    highest = maximum_over_ranks(highest) if every_rank else highest
    weight = torch.where(exists, torch.where(exists, logits - highest, 0.0).exp(), 0.0).unsqueeze(-1)
    mixture = rule == "mixture"
    spread = weight * (messages.variance + messages.mean.square()) if mixture else weight.square() * messages.variance
    sums = torch.cat([weight * messages.mean, spread, weight], -1).sum(1, keepdim=True)
    sums = sum_over_ranks(sums) if every_rank else sums
    width = messages.mean.shape[-1]
    # The largest weight is exp(0): less than 1 is none at all.
    total = sums[..., -1:].clamp_min(1)
    mean = sums[..., :width] / total
    if mixture:
        return Gaussian(mean, (sums[..., width:-1] / total - mean.square()).clamp_min(0))
    return Gaussian(mean, sums[..., width:-1] / total.square())
