"""The global sample order: which samples every optimizer step uses, as arithmetic on integers (docs/order.md).

One order per (release version, seed, epoch), the same for every world size and worker count. Nothing here knows of processes,
files or torch; a position is a step, and every step is found, and inverted, without walking through those before it.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import numpy as np

from draf_dist.data.horizon import Groups, Horizon
from draf_dist.data.permutation import IntArray, Line, Recent, block_at, permutation
from draf_dist.errors import SpecError, explain
from draf_dist.noise import chain

# Of every group, those that are remembered.
OPEN_WINDOWS = 3
# The tuple of their sizes, and six int64 in each of two lines.
BYTES_PER_SHARD = 36 + 2 * 6 * 8


@dataclass(frozen=True)
class Draws:
    """One global batch, sorted by group: three int64 arrays of one length, which is the batch size but in a short last batch.

    source: which release of a mixture, 0 where there is one. epoch: of that source. sample: index into its split, shards laid
    end to end in manifest order.
    """

    source: IntArray
    epoch: IntArray
    sample: IntArray


class Plan(Protocol):
    """What a loader follows: the draws of any step, and the step of any draw."""

    @property
    def batch_size(self) -> int:
        """B, the size of every batch but an epoch's last."""

    def draws(self, step: int) -> Draws:
        """The global batch of a step, counted from 0."""

    def locate(self, source: int, epoch: int, sample: int) -> tuple[int, int]:
        """The (step, entry in its global batch) at which a sample is drawn in an epoch of its source."""

    def last_use(self, source: int, epoch: int, samples: IntArray) -> IntArray:
        """A step after which each sample is not drawn any more in an epoch of its source: int64, one for each.

        Never before the step that draws it, and less than two windows and one step after it.
        """

    def horizon(self, source: int, epoch: int) -> Horizon:
        """Between which steps samples of an epoch of a source can be drawn."""

    def num_drawn(self, steps: int) -> tuple[int, ...]:
        """Draws of every source in the first `steps` steps: each at least as large as for any smaller number of steps."""


class TrainingOrder(Plan, Protocol):
    """What a run follows: a plan that has epochs."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps between two validations."""

    @property
    def cut_orders(self) -> "tuple[Order, ...]":
        """The order of every source, as it is drawn from."""


@dataclass(frozen=True)
class Order:
    """The order of one release's split.

    Args:
        shard_sizes: samples per shard, in manifest order; shards may be empty.
        release: version of the release.
        seed: of the job.
        batch_size: B, over all ranks.
        groups: G, the number of places of the epoch's line that feed every batch.
        open_samples: how many samples all windows hold together; it bounds the reach of the shuffle and the memory.

    Raises:
        SpecError: there is no sample, or a size is below 1.
    """

    shard_sizes: tuple[int, ...]
    release: str
    seed: int
    batch_size: int
    groups: int = 64
    open_samples: int = 65536

    def __post_init__(self) -> None:
        for name in ("batch_size", "groups", "open_samples"):
            require_positive(name, getattr(self, name))
        if self.num_samples < 1:
            where = f"release {self.release}"
            raise SpecError(explain(where, expected="at least one sample", found="none", remedy="Check the split."))

    @cached_property
    def num_samples(self) -> int:
        """N."""
        return sum(self.shard_sizes)

    @property
    def steps_per_epoch(self) -> int:
        """ceil(N / B)."""
        return -(-self.num_samples // self.batch_size)

    @property
    def num_groups(self) -> int:
        """G' = min(G, B, N)."""
        return min(self.groups, self.batch_size, self.num_samples)

    def draws(self, step: int) -> Draws:
        """The global batch of a step: step // steps_per_epoch is the epoch; an epoch's last batch may be short."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        sample = np.concatenate([part for group in range(self.num_groups) for part in self._group_samples(epoch, group, batch)])
        return Draws(source=np.zeros_like(sample), epoch=np.full_like(sample, epoch), sample=sample)

    def num_drawn(self, steps: int) -> tuple[int, ...]:
        """Draws in the first `steps` steps."""
        epochs, batches = divmod(steps, self.steps_per_epoch)
        return (epochs * self.num_samples + batches * self.batch_size,)

    def locate(self, source: int, epoch: int, sample: int) -> tuple[int, int]:
        """The (step, entry) at which a sample is drawn in an epoch; exact inverse of draws."""
        if source != 0 or epoch < 0 or not 0 <= sample < self.num_samples:
            raise ValueError(f"no such draw: source {source}, epoch {epoch}, sample {sample} of {self.num_samples}")
        line = int(self._line(epoch).positions(np.array([sample]))[0])
        group = bisect_right(self._starts, line) - 1
        within = line - self._starts[group]
        for purpose, offset in self._passes(group):
            start, size = block_at(within, offset, self._window(group), self._size(group))
            within = start + int(np.flatnonzero(self._block(epoch, purpose, group, start, size) == within)[0])
        batch = within // self._slots(group)
        before = sum(stop - start for start, stop in (self._positions(other, batch) for other in range(group)))
        return epoch * self.steps_per_epoch + batch, before + within - batch * self._slots(group)

    def last_use(self, source: int, epoch: int, samples: IntArray) -> IntArray:
        """A step after which each sample is not drawn any more in an epoch; less than two windows late."""
        return self.horizon(source, epoch).last_use(samples)

    def horizon(self, source: int, epoch: int) -> Horizon:
        """Between which steps samples of an epoch can be drawn."""
        if source != 0 or epoch < 0:
            raise ValueError(f"no such epoch: source {source}, epoch {epoch}")
        return Horizon(self._line(epoch), self._groups, lambda draw: epoch * self.steps_per_epoch + draw // self.batch_size)

    @property
    def cut_orders(self) -> "tuple[Order, ...]":
        """Itself: there is one source."""
        return (self,)

    @property
    def memory_bytes(self) -> int:
        """What it holds at most, in one process: sizes of the shards, the lines of two epochs, three windows of every group."""
        windows = OPEN_WINDOWS * sum(self._window(group) for group in range(self.num_groups))
        return BYTES_PER_SHARD * len(self.shard_sizes) + 8 * windows

    # Groups. Before group g come slot(g) = floor(g B / G') places of a batch and floor(N slot(g) / B) samples of the line.

    @cached_property
    def _slot_starts(self) -> tuple[int, ...]:
        return tuple(group * self.batch_size // self.num_groups for group in range(self.num_groups + 1))

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(self.num_samples * slot // self.batch_size for slot in self._slot_starts)

    @cached_property
    def _groups(self) -> Groups:
        windows = [self._window(group) for group in range(self.num_groups)]
        starts, slot_starts, window = (np.array(cut, np.int64) for cut in (self._starts, self._slot_starts, windows))
        return Groups(starts, slot_starts, window, self.batch_size, self.num_samples)

    def _slots(self, group: int) -> int:
        return self._slot_starts[group + 1] - self._slot_starts[group]

    def _size(self, group: int) -> int:
        return self._starts[group + 1] - self._starts[group]

    def _positions(self, group: int, batch: int) -> tuple[int, int]:
        """What a batch takes of a group: positions [start, stop) of the group's shuffled sequence."""
        slots, size = self._slots(group), self._size(group)
        return min(batch * slots, size), min((batch + 1) * slots, size)

    # Windows. A group's part of the line is permuted in blocks, then again in blocks that lie half a window off, so that a
    # sample can wander about a window and any position is found from at most three permutations of a window.

    def _window(self, group: int) -> int:
        return max(1, min(self.open_samples // self.num_groups, self._size(group)))

    def _passes(self, group: int) -> tuple[tuple[str, int], tuple[str, int]]:
        """Purpose, for the key, and offset of the blocks of both passes."""
        return ("first pass", 0), ("second pass", self._window(group) // 2)

    def _block(self, epoch: int, purpose: str, group: int, start: int, size: int) -> IntArray:
        """Positions [start, start + size) of a group as a pass permutes them: entry i says what comes to position start + i."""
        return start + permutation(size, self._key(epoch, purpose, self._starts[group] + start))

    def _group_samples(self, epoch: int, group: int, batch: int) -> list[IntArray]:
        """Samples that a group gives to a batch."""
        start, stop = self._positions(group, batch)
        window, group_size = self._window(group), self._size(group)
        parts = []
        while start < stop:
            first, size = block_at(start, window // 2, window, group_size)
            samples = self._open.get((epoch, group, first), partial(self._open_window, epoch, group, first, size))
            parts.append(samples[start - first : stop - first])
            start += len(parts[-1])
        return parts

    def _open_window(self, epoch: int, group: int, first: int, size: int) -> IntArray:
        """Samples of one block of the second pass, [first, first + size) of the group, in their final order."""
        (before, _), (after, _) = self._passes(group)
        window, group_size = self._window(group), self._size(group)
        origin, _ = block_at(first, 0, window, group_size)
        starts = range(origin, first + size, window)
        moved = np.concatenate([self._block(epoch, before, group, start, min(window, group_size - start)) for start in starts])
        chosen = moved[self._block(epoch, after, group, first, size) - origin]
        return self._line(epoch).samples(self._starts[group] + chosen)

    def _key(self, epoch: int, purpose: str, index: int) -> int:
        return chain(self.seed, self.release, epoch, purpose, index)

    def _line(self, epoch: int) -> Line:
        return self._lines.get(epoch, lambda: Line.of(self.shard_sizes, self._key(epoch, "shards", 0)))

    @cached_property
    def _lines(self) -> Recent[Line]:
        return Recent(2)

    @cached_property
    def _open(self) -> Recent[IntArray]:
        # A batch may straddle two windows of every group.
        return Recent(OPEN_WINDOWS * self.num_groups)


def rank_entries(num_entries: int, batch_size: int, rank: int, world: int) -> slice:
    """The entries of a global batch that are a rank's: [floor(r B / W), floor((r + 1) B / W)), as far as the batch has them.

    Args:
        num_entries: of this batch: B, or less for the last one of an epoch.
        batch_size: B. Ranks differ by at most one entry where the batch is full.
        rank: r, from 0.
        world: W, at most B.

    Raises:
        SpecError: more ranks than entries, or no such rank.
    """
    if not 0 <= rank < world <= batch_size:
        raise SpecError(
            explain(
                f"rank {rank} of {world}",
                expected=f"0 <= rank < world <= the batch size, {batch_size}",
                found=f"rank {rank}, world {world}",
                remedy="Use fewer ranks or a larger batch_size.",
            )
        )
    start, stop = rank * batch_size // world, (rank + 1) * batch_size // world
    return slice(min(start, num_entries), min(stop, num_entries))


def require_positive(name: str, value: int) -> None:
    """Raise SpecError unless a size is at least 1."""
    if value < 1:
        raise SpecError(explain(name, expected="at least 1", found=str(value), remedy="Correct the job."))
