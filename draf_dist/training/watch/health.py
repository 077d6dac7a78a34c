"""Steps that went bad: a loss or gradient that is not finite, or far from what it was; and steps whose update is left out.

A step whose update is skipped is drawn and counted like every other one: the order, the learning rate and the numbers of the steps
stay. Which ones are skipped stands in the ledger before anything else happens, and every later attempt skips them too, without
judging again. So the weights after any step are a function of the job and of that list, on any number of ranks, after any kill.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from draf_dist.errors import DrafError, explain
from draf_dist.training.journal import Line
from draf_dist.training.watch.bad_loss import BadLoss

EVENT = "skipped"
# What is far is told by so many good steps before, and not told before there are so many.
REMEMBERED, FEWEST = 50, 20


@dataclass(frozen=True)
class Skipped:
    """Steps [start, stop), counted from 0, whose update is skipped, and why."""

    start: int
    stop: int
    why: str

    @property
    def name(self) -> str:
        """Which steps, as metrics.jsonl counts."""
        return f"{self.start + 1} to {self.stop}"


class BadStep(Exception):  # noqa: N818 - what it means is decided by who catches it
    """A step, counted from 0, after which the run can't go on as it is: its update is in the weights, or is not to be skipped."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"step {step + 1}: {why}")
        self.step, self.why = step, why


class RollBack(Exception):  # noqa: N818 - no error: the attempt ends here, and another one begins
    """What to skip is recorded: the run goes on from its newest checkpoint without any of it."""


@dataclass
class Health:
    """What one attempt knows of good and bad steps: the same on every rank, as it looks at numbers of the global batch alone."""

    # None judges nothing: what was decided before is followed, whatever the numbers.
    rule: BadLoss | None = BadLoss()
    skipped: list[Skipped] = field(default_factory=list)
    # Steps done at the last checkpoint that a run saves unasked (schedule.SaveGrid). One that somebody asked for does not count, or
    # what is skipped would depend on when the run was stopped.
    last_save: Callable[[int], int] = lambda step: step
    _seen: dict[str, deque[float]] = field(default_factory=dict)

    @classmethod
    def at(
        cls,
        rule: BadLoss | None,
        ledger: Iterable[Line],
        metrics: Iterable[Line],
        start: int,
        last_save: Callable[[int], int] = lambda step: step,
    ) -> "Health":
        """As an attempt that had done the first `start` steps itself would know it, from the books of the run."""
        recorded = [Skipped(line["start"], line["stop"], line["why"]) for line in ledger if line["event"] == EVENT]
        health = cls(rule, recorded, last_save)
        for line in metrics:
            if line["event"] == "step" and line["step"] <= start:
                health._remember("loss", line["loss"])
                health._remember("gradient", line["gradient_norm"])
        return health

    def skipped_at(self, step: int) -> Skipped | None:
        """What is recorded that skips a step, counted from 0."""
        return next((known for known in self.skipped if known.start <= step < known.stop), None)

    def but_for(self, step: int) -> "Health":
        """The same, with one step done all the same."""
        before = [replace(known, stop=min(known.stop, step)) for known in self.skipped]
        after = [replace(known, start=max(known.start, step + 1)) for known in self.skipped]
        return Health(self.rule, [known for known in before + after if known.start < known.stop], self.last_save)

    def judge(self, what: Literal["loss", "gradient"], value: float) -> str | None:
        """Why a value of the global batch is bad, None where it is good; a good one is remembered."""
        if self.rule is None:
            return None
        if not math.isfinite(value):
            return f"{what} {value}"
        seen, factor = self._seen.get(what, ()), self.rule.exploding
        if factor is not None and len(seen) >= FEWEST:
            usual = statistics.median(seen)
            if abs(value) > factor * usual:
                return f"{what} {value:.4g}, more than {factor:g} times the usual {usual:.4g}"
        self._remember(what, value)
        return None

    def skip_or_raise(self, step: int, why: str) -> Skipped:
        """Skips a bad step whose update has not been applied, if that is the rule.

        Raises:
            DrafError, BadStep: see `bad`.
        """
        error = self.bad(step, why)
        if self.rule is None or self.rule.action != "skip" or not isinstance(error, BadStep):
            raise error
        return self.skip(error)

    def bad(self, step: int, why: str) -> "DrafError | BadStep":
        """What is to be raised at a bad step: an error where the run is to stop or has met too many one after the other."""
        if self.rule is None or self.rule.action == "stop":
            return _stopped(step, why, "Lower optimizer.learning_rate, or set on_bad_loss.action to skip or roll_back.")
        if self._in_a_row(step) >= self.rule.at_most:
            times = f"It is the {self.rule.at_most + 1}. bad step in a row, and on_bad_loss.at_most is {self.rule.at_most}"
            return _stopped(step, why, f"{times}: lower optimizer.learning_rate.")
        return BadStep(step, why)

    def skip(self, bad: BadStep) -> Skipped:
        """What is skipped because of a bad step, from now on."""
        back = self.rule is not None and self.rule.action == "roll_back"
        self.skipped.append(Skipped(self.last_save(bad.step) if back else bad.step, bad.step + 1, bad.why))
        return self.skipped[-1]

    def _in_a_row(self, step: int) -> int:
        """Bad steps directly before this one: every record ends with one."""
        ends = {known.stop for known in self.skipped}
        num = 0
        while step - num in ends:
            num += 1
        return num

    def _remember(self, what: str, value: float) -> None:
        self._seen.setdefault(what, deque(maxlen=REMEMBERED)).append(abs(value))


def holds_skipped(ledger: Iterable[Line], step: int, attempt: int) -> bool:
    """Whether a checkpoint, of that attempt, may hold an update that only a later attempt has found to be skipped."""
    skipped = (line for line in ledger if line["event"] == EVENT)
    return any(line["start"] < step and attempt < line["attempt"] for line in skipped)


def _stopped(step: int, why: str, remedy: str) -> DrafError:
    what, _, value = why.partition(" ")
    expected = f"a {what} near the usual" if "," in value else f"a finite {what}"
    return DrafError(explain(f"step {step + 1}", expected=expected, found=value, remedy=remedy))
