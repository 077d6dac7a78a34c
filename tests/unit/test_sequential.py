"""What a pass through a split in its own order holds of the cache."""

import numpy as np
import pytest

from draf_dist.data.sequential import Sequential

BLOCK = 1000


def most_held(plan: Sequential, shard_bytes: list[int], ahead: int) -> int:
    """The most bytes of blocks that ahead + 1 batches touch, walked through; samples of a shard are equally large."""
    starts = np.concatenate([[0], np.cumsum(plan.shard_sizes)])
    most = 0
    for first in range(0, int(starts[-1]), plan.batch_size):
        held = set()
        for sample in range(first, min(first + (ahead + 1) * plan.batch_size, int(starts[-1]))):
            shard = int(np.searchsorted(starts, sample, side="right")) - 1
            size, row, num = shard_bytes[shard], sample - int(starts[shard]), plan.shard_sizes[shard]
            held |= {(shard, block) for block in range(row * size // num // BLOCK, -(-(row + 1) * size // num // BLOCK))}
        most = max(most, sum(min(BLOCK, shard_bytes[shard] - block * BLOCK) for shard, block in held))
    return most


@pytest.mark.parametrize("ahead", [0, 2, 50])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_what_is_open_is_within_the_bound_and_not_far_from_it(batch_size: int, ahead: int) -> None:
    random = np.random.default_rng(batch_size + ahead)
    sizes = tuple(random.integers(0, 40, 30).tolist())
    shard_bytes = [num * int(random.integers(20, 3000)) + 1024 for num in sizes]
    plan = Sequential(sizes, batch_size)
    held, bound = most_held(plan, shard_bytes, ahead), plan.open_bytes(shard_bytes, block_bytes=BLOCK, ahead_steps=ahead)
    # A block at either end, and what a sample that begins there shares with the one before.
    assert held <= bound <= held + 5 * BLOCK


def test_small_shards_take_no_more_than_there_is_of_them() -> None:
    plan = Sequential((5, 0, 5, 5), 5)
    assert plan.open_bytes([900, 1024, 800, 700], block_bytes=2**20, ahead_steps=10) == 2400
    assert plan.open_bytes([900, 1024, 800, 700], block_bytes=2**20, ahead_steps=0) == 900
    assert Sequential((), 5).open_bytes([], block_bytes=BLOCK, ahead_steps=1) == 0
