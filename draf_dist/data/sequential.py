"""A pass through a split in the order in which it is stored."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from draf_dist.data.shard_reader import IntArray


@dataclass(frozen=True)
class Sequential:
    """Batch number `step` holds samples [step B, (step + 1) B)."""

    shard_sizes: tuple[int, ...]
    batch_size: int

    def last_use(self, source: int, epoch: int, samples: IntArray) -> IntArray:
        """The step that reads each sample."""
        return samples // self.batch_size

    def open_bytes(self, shard_bytes: Sequence[int], *, block_bytes: int, ahead_steps: int) -> int:
        """An upper bound of what is in use at once: the blocks of ahead_steps + 1 batches.

        Of a shard that is not in use whole, samples are taken as equally large, with a slack of a block at either end.
        """
        shards = [(num, size) for num, size in zip(self.shard_sizes, shard_bytes, strict=True) if num]
        if not shards:
            return 0
        num, size = np.array(shards, np.int64).T
        ends, starts_bytes = np.cumsum(num), np.cumsum(size) - size
        first = np.arange(0, ends[-1], self.batch_size)
        stop = np.minimum(first + (ahead_steps + 1) * self.batch_size, ends[-1])
        of_first, of_last = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, stop - 1, side="right")
        # Where a shard is cut: in blocks of it.
        before = (first - (ends - num)[of_first]) * size[of_first] // num[of_first] // block_bytes - 1
        until = -((((ends - num)[of_last] - stop) * size[of_last]) // num[of_last] // block_bytes) + 1
        first_byte = starts_bytes[of_first] + np.maximum(before, 0) * block_bytes
        last_byte = starts_bytes[of_last] + np.minimum(until * block_bytes, size[of_last])
        return int((last_byte - first_byte).max())
