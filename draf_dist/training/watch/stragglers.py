"""A rank that is slow again and again, named.

Ranks go from step to step together, so that all steps last equally long: what tells them apart is the time that each needs before
the first collective of a step, for its data and its forward. A rank whose backward alone is slow is not found by it.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Steps from one comparison to the next; comparisons in a row that must find a rank slow. Found after 10 to 15 slow steps.
EVERY = 5
IN_A_ROW = 2
# How far from the others, in robust standard deviations; and the share of a step below which it is not worth a word.
FAR = 5.0
WORTH = 0.1
MAD_TO_SD = 1.4826
# No rank's own times are more even than this share of them.
LEAST_SPREAD = 0.1


@dataclass(frozen=True)
class SlowRank:
    """A rank, its median seconds a step for data and forward, those of the others, and which of the two is the longer excess."""

    rank: int
    own_s: float
    others_s: float
    of: str

    @property
    def message(self) -> str:
        """In one line."""
        return f"rank {self.rank} is slow: {self.own_s:.3f} s a step for {self.of}, the others {self.others_s:.3f} s"


def find_slow(own_s: Sequence[float], step_s: float) -> list[int]:
    """Ranks further than FAR deviations above the median of the *others*, so that two ranks are enough.

    own_s: by rank; step_s: what a step lasts.
    """
    slow = []
    for rank, mine in enumerate(own_s):
        others = [*own_s[:rank], *own_s[rank + 1 :]]
        if not others:
            return []
        usual = statistics.median(others)
        spread = statistics.median(abs(other - usual) for other in others) * MAD_TO_SD
        if mine - usual > max(FAR * max(spread, LEAST_SPREAD * usual), WORTH * step_s):
            slow.append(rank)
    return slow


@dataclass
class Stragglers:
    """Compares the ranks of an attempt every few steps; every rank gets the same answer. reduce: sum over ranks."""

    rank: int
    world: int
    reduce: Callable[[Tensor], Tensor]
    device: torch.device
    _seconds: list[tuple[float, float, float]] = field(default_factory=list)
    _times: dict[int, int] = field(default_factory=dict)

    def add(self, wait_s: float, forward_s: float, step_s: float) -> list[SlowRank]:
        """One step of this rank; ranks that have just turned out to be slow. A collective every EVERY steps."""
        if self.world == 1:
            return []
        self._seconds.append((wait_s, forward_s, step_s))
        if len(self._seconds) < EVERY:
            return []
        mine = torch.zeros(self.world, 3, dtype=torch.float64)
        # Of a median a single hiccup is no part.
        mine[self.rank] = torch.tensor([statistics.median(column) for column in zip(*self._seconds, strict=True)])
        self._seconds.clear()
        return self._compare(self.reduce(mine.to(self.device)).tolist())

    def _compare(self, rows: list[list[float]]) -> list[SlowRank]:
        waits, forwards, steps = zip(*rows, strict=True)
        own = [wait + forward for wait, forward in zip(waits, forwards, strict=True)]
        slow = find_slow(own, statistics.median(steps))
        self._times = {rank: self._times.get(rank, 0) + 1 for rank in slow}
        return [self._named(rank, waits, forwards) for rank in slow if self._times[rank] == IN_A_ROW]

    def _named(self, rank: int, waits: Sequence[float], forwards: Sequence[float]) -> SlowRank:
        waits_more, forwards_more = (_excess(column, rank) for column in (waits, forwards))
        of, column = ("data", waits) if waits_more > forwards_more else ("its forward", forwards)
        return SlowRank(rank, column[rank], column[rank] - _excess(column, rank), of)


def _excess(column: Sequence[float], rank: int) -> float:
    return column[rank] - statistics.median([*column[:rank], *column[rank + 1 :]])
