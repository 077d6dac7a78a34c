"""The uncertainties of models/uncertainty.py without all passes at once: of a map, T x B x K x voxels do not fit into memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

from draf_dist.models.link import Link

_TINY = 1e-30


class StreamedUncertainty:
    """Sums over passes of p, p^2 and p log p, from which every uncertainty follows (spec 3.4).

    epistemic = mean p^2 - pbar^2, aleatoric = mean p - mean p^2, entropy = -sum pbar log pbar, mi = entropy + mean sum p log p,
    summed over classes as in `uncertainty.decompose`, to which they are equal; of yes-or-no questions the mean over them, as in
    `Link.uncertainties`. In f64: the epistemic variance is a small difference of large sums.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.passes = 0
        self._rows = torch.Size()
        self._sum = self._squared = self._log = torch.zeros(())

    def add(self, probability: Tensor) -> None:
        """One pass more: probabilities (B, K, ...) of any space behind the classes, of the same shape each time."""
        events = self._events(probability.detach().double())
        # Of two classes the second alone, as in `decompose`; squares and logarithms need no axis of classes.
        scalar = events[:, 1:] if events.shape[1] == 2 else events
        squared = scalar.square().sum(1)
        log = (events * events.clamp_min(_TINY).log()).sum(1)
        if self.passes == 0:
            self._sum, self._squared, self._log = torch.zeros_like(events), torch.zeros_like(squared), torch.zeros_like(log)
        self._sum += events
        self._squared += squared
        self._log += log
        self.passes += 1

    @property
    def probability(self) -> Tensor:
        """The mean over passes, f32 (B, K, ...)."""
        mean = self._sum / self.passes
        return (mean if self.link.exclusive else self._by_question(mean[:, 1])).float()

    def uncertainties(self) -> dict[str, Tensor]:
        """Epistemic, aleatoric, total, entropy and mi, each f32 (B, ...)."""
        mean = self._sum / self.passes
        scalar = mean[:, 1:] if mean.shape[1] == 2 else mean
        squared, log = self._squared / self.passes, self._log / self.passes
        entropy = -(mean * mean.clamp_min(_TINY).log()).sum(1)
        found = {
            "epistemic": (squared - scalar.square().sum(1)).clamp_min(0),
            "aleatoric": scalar.sum(1) - squared,
            "total": (scalar * (1 - scalar)).sum(1),
            "entropy": entropy,
            "mi": (entropy + log).clamp_min(0),
        }
        if self.link.exclusive:
            return {name: value.float() for name, value in found.items()}
        return {name: self._by_question(value).mean(1).float() for name, value in found.items()}

    def _events(self, probability: Tensor) -> Tensor:
        """Exclusive classes as they are; of K questions a row each, of two classes."""
        if self.link.exclusive:
            return probability
        self._rows = probability.shape[:2]
        asked = probability.flatten(0, 1)
        return torch.stack([1 - asked, asked], dim=1)

    def _by_question(self, values: Tensor) -> Tensor:
        """Values (B K, ...) as (B, K, ...)."""
        return values.view(*self._rows, *values.shape[1:])


@torch.no_grad()
def streamed(passes: Iterable[Tensor], link: Link) -> StreamedUncertainty:
    """What is found in the logits (B, K, ...) of one pass after the other."""
    found = StreamedUncertainty(link)
    for logits in passes:
        # The classes stand behind the rows here, and last in what a link takes.
        found.add(link.probability(logits.movedim(1, -1)).movedim(-1, 1))
    return found
