"""How the learning rate moves, when a run saves and when it stops: pure functions of the step and of what validation found."""

import math
from dataclasses import dataclass

from draf_dist.schema.record import Record


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up over the first part of the run, then half a cosine that ends at 0 after the last step.

    lr(t) = peak (t + 1) / w                          for t < w = ceil(warmup_fraction * num_steps)
    lr(t) = peak (1 + cos(pi (t - w) / (num_steps - w))) / 2   for t >= w
    """

    peak: float
    num_steps: int
    warmup_fraction: float

    def __call__(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        warmup = math.ceil(self.warmup_fraction * self.num_steps)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        progress = (step - warmup) / max(self.num_steps - warmup, 1)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True)
class SaveGrid:
    """The steps after which a run saves, unasked: the last one of every epoch, and within an epoch every `every_steps`.

    Counted within the epoch, so that no save comes soon after that of an epoch's end, and none is further from the next than
    min(every_steps, steps_per_epoch).
    """

    every_steps: int
    steps_per_epoch: int

    def last(self, step: int) -> int:
        """The last of them up to `step` steps done; 0 before the first."""
        return step - step % self.steps_per_epoch % self.every_steps


class EarlyStopping(Record):
    """The lowest loss of validation so far and for how many epochs nothing has beaten it.

    best_loss and best_step are None before the first validation; best_step is the number of optimizer steps done by then.
    """

    patience: int
    best_loss: float | None = None
    best_step: int | None = None
    stale_epochs: int = 0

    def after(self, loss: float, step: int) -> "EarlyStopping":
        """The state after a validation. A NaN is never better than a number."""
        if not math.isnan(loss) and (self.best_loss is None or loss < self.best_loss):
            return EarlyStopping(patience=self.patience, best_loss=loss, best_step=step)
        return self.model_copy(update={"stale_epochs": self.stale_epochs + 1})

    @property
    def exhausted(self) -> bool:
        """Whether `patience` epochs have passed without a new best."""
        return self.stale_epochs >= self.patience
