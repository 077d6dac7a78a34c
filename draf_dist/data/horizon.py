"""Between which steps a sample can be drawn, from block arithmetic alone: no permutation is computed (docs/order.md, 7).

What stands at position p of a group of n samples lies in block [a, b) of the first pass, a = floor(p / w) w, b = min(a + w, n),
and can come to any place in it. The second pass, cut at 0, h, h + w, ... with h = floor(w / 2), moves it once more within the block
that holds that place. So it ends in [first, stop): from the start of the second pass's block of a to the end of that of b - 1.

first = max(h + floor((a - h) / w) w, 0) >= a - w, as a block of the second pass starts less than w before any place in it;
stop = min(h + floor((b - 1 - h) / w) w + w, n) <= b - 1 + w, likewise. Blocks of the first pass start at multiples of w, so with
a = k w and b = a + w these are h + (k - 1) w and h + (k + 1) w: 2 w places, two windows. A sample is drawn in [first, stop), hence
stop - 1 is never before the place where it is drawn, and less than two windows behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from draf_dist.data.permutation import IntArray, Line


@dataclass(frozen=True)
class Groups:
    """How an order cuts every epoch's line. starts: int64 (G' + 1,) along the line; slot_starts: likewise within a batch.

    window: int64 (G',). batch_size: B of the order. num_samples: N.
    """

    starts: IntArray
    slot_starts: IntArray
    window: IntArray
    batch_size: int
    num_samples: int

    def of(self, positions: IntArray) -> IntArray:
        """The group that each position of the line lies in; a group without samples is never one."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def reach(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """The first and the last draw of the epoch, in 0 .. N-1, that can be of what stands at positions of the line."""
        group = self.of(positions)
        start, window, slots = self.starts[group], self.window[group], np.diff(self.slot_starts)[group]
        size, half = self.starts[group + 1] - start, window // 2
        block = (positions - start) // window * window
        block_last = np.minimum(block + window, size) - 1
        first = np.maximum(half + (block - half) // window * window, 0)
        last = np.minimum(half + (block_last - half) // window * window + window, size) - 1
        # Before a group's entries of a batch come slot_starts[group] others: fewer in an epoch's last batch if it is short.
        last_draw = last // slots * self.batch_size + self.slot_starts[group] + last % slots
        return first // slots * self.batch_size, np.minimum(last_draw, self.num_samples - 1)


@dataclass(frozen=True)
class Horizon:
    """One epoch of one source of a plan. step_of: draws of the epoch, 0 .. N-1, to steps of the plan; never falling."""

    line: Line
    groups: Groups
    step_of: Callable[[IntArray], IntArray]

    def span(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """The first and the last step that can draw what stands at positions of the line."""
        first, last = self.groups.reach(positions)
        return self.step_of(first), self.step_of(last)

    def last_use(self, samples: IntArray) -> IntArray:
        """A step after which each sample, in manifest order, is not drawn any more in this epoch.

        Raises:
            ValueError: a sample that the source does not have.
        """
        if len(samples) and not 0 <= samples.min() <= samples.max() < self.groups.num_samples:
            raise ValueError(f"no such sample: {samples.min()} .. {samples.max()} of {self.groups.num_samples}")
        return self.span(self.line.positions(samples))[1]
