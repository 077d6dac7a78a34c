"""From logits to probabilities and their uncertainties, as the task asks: one class of K, or K yes-or-no questions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from draf_dist.models.uncertainty import UncertaintyName, UncertaintySpace, decompose, logit_variance
from draf_dist.schema.label import LabelSpec, SegmentationSpec, TaskSpec

# Of 0 and 1, in f32.
_NEAR = 1e-7


@dataclass(frozen=True)
class Link:
    """exclusive: softmax over K classes. Otherwise sigmoid of K logits: labels, or the hazards of K intervals."""

    exclusive: bool

    def probability(self, logits: Tensor) -> Tensor:
        """Probabilities (..., K) of logits (..., K), in f32 at least."""
        wide = in_f32_at_least(logits)
        return wide.softmax(-1) if self.exclusive else wide.sigmoid()

    def logits(self, probability: Tensor) -> Tensor:
        """Logits (..., K) whose probabilities are the given ones, finite at 0 and 1 too."""
        if self.exclusive:
            return probability.clamp_min(torch.finfo(probability.dtype).tiny).log()
        return probability.clamp(_NEAR, 1 - _NEAR).logit()

    def uncertainties(self, logits: Tensor) -> dict[str, Tensor]:
        """Every uncertainty of logits (S, ..., K), to (...); of yes-or-no questions the mean over them (spec 1.1 row 3).

        In f32 at least: what passes differ by is a small difference of probabilities, which half precision rounds off.
        """
        probability = self.probability(logits)
        if self.exclusive:
            return decompose(probability)
        return {name: value.mean(-1) for name, value in decompose(_two_classes(probability)).items()}

    def uncertainty(self, space: UncertaintySpace, name: UncertaintyName, logits: Tensor, prior: Tensor) -> Tensor:
        """One uncertainty of logits (S, ..., K) in one space, to (...).

        `prior_shifted` takes the prior's logits (K,) off first, so that U is large where the modality has no evidence rather
        than where the risk is high (findings 1). `logit` has the epistemic variance only.
        """
        logits = in_f32_at_least(logits)
        if space == "logit":
            return logit_variance(logits) if self.exclusive else logits.var(0, correction=0).mean(-1)
        return self.uncertainties(logits - prior if space == "prior_shifted" else logits)[name]

    def prior(self, held: Tensor, of: Tensor) -> Tensor:
        """The logits (K,) of outcomes that held so often of so many, f32 (K,) both; finite where one never or always held."""
        if self.exclusive:
            counts = held.clamp_min(1)
            return (counts / counts.sum()).log()
        yes, no = held.clamp_min(1), (of - held).clamp_min(1)
        return yes.log() - no.log()


def link_of(task: TaskSpec) -> Link:
    """The link of a task."""
    return Link(exclusive=isinstance(task, LabelSpec | SegmentationSpec))


def in_f32_at_least(values: Tensor) -> Tensor:
    """The values in f32, or f64 if they are: a model under autocast hands on half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _two_classes(probability: Tensor) -> Tensor:
    return torch.stack([1 - probability, probability], dim=-1)
