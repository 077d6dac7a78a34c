"""A pass through a split in the order in which it is stored."""

from collections.abc import Sequence
from dataclasses import dataclass

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
        """An upper bound of what is in use at once: the samples of ahead_steps + 1 batches, and blocks that they share.

        The samples of a shard are taken as equally large, and a window of them to lie wherever they are largest.
        """
        window = (ahead_steps + 1) * self.batch_size
        sizes = [(num, size) for num, size in zip(self.shard_sizes, shard_bytes, strict=True) if num]
        if not sizes:
            return 0
        num_shards = min(len(sizes), window // min(num for num, _ in sizes) + 2)
        whole = sum(size + block_bytes for _, size in sizes)
        return min(whole, int(window * max(size / num for num, size in sizes)) + 2 * num_shards * block_bytes)
