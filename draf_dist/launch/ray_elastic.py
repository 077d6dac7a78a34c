"""More and fewer nodes: with how many workers to start, when to stop them for another number, when to give up. Decisions only."""

from dataclasses import dataclass

# Why workers are stopped that are to start again: one of their nodes will be taken away; more of them fit.
PREEMPTION, RESIZE = "preemption", "resize"
RESTARTS = frozenset({PREEMPTION, RESIZE})
# Nodes rarely come alone, and what a lost one held is not free at once.
SETTLE_S = 3.0


@dataclass
class Steady:
    """For how long a number has been what it is."""

    value: int | None = None
    since: float = 0.0

    def seen(self, value: int, now: float) -> float:
        """Seconds since it became `value`, 0 where that is new. now: by a monotonic clock."""
        if value != self.value:
            self.value, self.since = value, now
        return now - self.since


@dataclass(frozen=True)
class Look:
    """What one look at the cluster finds while workers run.

    ranks_on, leaving: nodes that hold ranks, and those that will be taken away, by Ray's ids. more: workers that would fit in
    addition; steady_s: for how long it has been so many. running_s: since these workers were started.
    """

    ranks_on: frozenset[str]
    leaving: frozenset[str]
    more: int
    steady_s: float
    running_s: float


@dataclass(frozen=True)
class Failures:
    """Failures in a row, without a checkpoint between them that is newer than all before. newest: its step, -1 before the first."""

    allowed: int
    in_a_row: int = 0
    newest: int = -1

    def after(self, newest: int) -> "Failures":
        """One more. newest: step of the newest checkpoint by now, 0 without any."""
        in_a_row = 1 if newest > self.newest else self.in_a_row + 1
        return Failures(self.allowed, in_a_row, max(newest, self.newest))

    @property
    def are_too_many(self) -> bool:
        """Whether the run is to end: it would fail for ever."""
        return self.in_a_row > self.allowed


def workers_to_start(places: int, steady_s: float, *, least: int, most: int) -> int | None:
    """With how many to start, None to go on waiting. places: workers that fit now; steady_s: for how long it has been so many.

    There is no waiting for a replacement: growing later costs a start of the workers and no step.
    """
    if places >= most:
        return most
    return places if places >= least and steady_s >= SETTLE_S else None


def reason_to_stop(look: Look, *, pause_s: float) -> str | None:
    """Why running workers are to stop after the step in hand and start again, None if they are not.

    pause_s: workers run at least so long before more of them are wanted.
    """
    if look.ranks_on & look.leaving:
        return PREEMPTION
    if look.more > 0 and look.steady_s >= SETTLE_S and look.running_s >= pause_s:
        return RESIZE
    return None
