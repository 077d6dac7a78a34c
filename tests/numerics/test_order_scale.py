"""The order of a billion samples in a hundred thousand shards, on 1 to 4,096 ranks: time, memory, balance, reads.

Limits of time and memory are five times what one core of a laptop-class server took (docs/planning.md).
"""

import time
import tracemalloc
from collections import Counter, OrderedDict

import numpy as np
import pytest

from draf_dist.data.order import Order, rank_entries
from draf_dist.data.working_set import open_blocks, step_fetch

NUM_SHARDS, SHARD_SAMPLES, SAMPLE_BYTES = 100_000, 10_000, 46_000
WORLDS = (1, 2, 3, 7, 8, 64, 100, 1000, 1024, 4095, 4096)
BATCH = 4096


@pytest.fixture(scope="module")
def billion() -> Order:
    return Order((SHARD_SAMPLES,) * NUM_SHARDS, "v1", 0, BATCH)


def seconds(function: object, *arguments: object) -> float:
    """Processor time of a call: a busy machine does not change it much."""
    began = time.process_time()
    function(*arguments)  # type: ignore[operator]
    return time.process_time() - began


def test_the_order_is_built_and_a_step_drawn_in_milliseconds() -> None:
    order = Order((SHARD_SAMPLES,) * NUM_SHARDS, "v1", 1, BATCH)
    assert order.num_samples == 10**9
    steps = [seconds(order.draws, step) for step in range(1, 100)]
    assert steps[0] < 0.25  # the line of the shards, and the first window of every group
    assert max(steps[1:]) < 0.15  # a step that opens windows
    assert np.mean(steps[1:]) < 0.02
    far = seconds(order.draws, 7 * order.steps_per_epoch + 123_456)
    assert far < 0.25  # any step of any epoch, without those before it
    locate = seconds(order.locate, 0, 0, 987_654_321)
    assert locate < 0.05


def test_memory_is_that_of_the_shards_and_open_samples_and_what_the_order_says() -> None:
    tracemalloc.start()
    order = Order(tuple(int(size) for size in np.full(NUM_SHARDS, SHARD_SAMPLES)), "v1", 2, BATCH)
    for step in (*range(0, 60, 5), order.steps_per_epoch + 3):
        order.draws(step)
    order.last_use(0, 1, np.arange(1000))
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.8 * held <= order.memory_bytes < 20e6
    assert most < 5 * order.memory_bytes


@pytest.mark.parametrize("batch_size", [BATCH, 5000])
def test_ranks_of_every_world_have_rows_within_one_of_each_other_and_share_none(batch_size: int) -> None:
    for world in WORLDS:
        cuts = [rank_entries(batch_size, batch_size, rank, world) for rank in range(world)]
        rows = [cut.stop - cut.start for cut in cuts]
        assert max(rows) - min(rows) <= 1
        assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])]
        assert cuts[-1].stop == batch_size


def test_every_rank_of_the_largest_world_gets_samples_in_every_step_from_all_over_the_line(billion: Order) -> None:
    sample = billion.draws(1000).sample
    assert len(np.unique(sample)) == BATCH
    ranks = [sample[rank_entries(BATCH, BATCH, rank, 4096)] for rank in range(4096)]
    assert all(len(part) == 1 for part in ranks)
    # 64 groups feed every batch, each from the few shards of its window.
    assert 64 <= len(np.unique(sample // SHARD_SAMPLES)) <= 64 * 4


def test_all_but_a_few_shards_are_read_in_one_stretch_of_an_epoch(billion: Order) -> None:
    horizon = billion.horizon(0, 0)
    line, groups = horizon.line, horizon.groups
    stretches = 1 + groups.of(line.ends - 1) - groups.of(line.starts)
    # A shard that two groups share is read at the end of one and at the beginning of the other.
    assert set(stretches.tolist()) == {1, 2}
    assert (stretches == 2).sum() <= 63
    first, last = horizon.span(line.starts), horizon.span(line.ends - 1)
    steps = (last[1] - first[0] + 1)[stretches == 1]
    # Of a group come 64 samples a step: its own 10,000, and less than two windows more at either end.
    assert steps.max() <= (SHARD_SAMPLES + 2 * 2 * 1024) / 64 + 2
    assert steps.max() < billion.steps_per_epoch / 1000


def test_sampled_shards_are_covered_by_steps_that_draw_just_these_samples(billion: Order) -> None:
    random = np.random.default_rng(0)
    found = []
    for shard in random.choice(NUM_SHARDS, 20, replace=False).tolist():
        samples = shard * SHARD_SAMPLES + random.choice(SHARD_SAMPLES, 10, replace=False)
        located = [billion.locate(0, 0, sample) for sample in samples.tolist()]
        last = billion.last_use(0, 0, samples)
        assert all(step <= use <= step + 2 * 1024 // 64 for (step, _), use in zip(located, last.tolist(), strict=True))
        found += zip(located, samples.tolist(), strict=True)
    assert len({place for place, _ in found}) == len(found)
    for (step, entry), sample in found[::5]:
        assert billion.draws(step).sample[entry] == sample


def test_a_whole_shard_is_drawn_whole(billion: Order) -> None:
    line, first = billion.horizon(0, 3).line, 12_345 * SHARD_SAMPLES
    samples = np.arange(first, first + SHARD_SAMPLES)
    start, stop = (
        int(step)
        for step in (billion.horizon(0, 3).span(line.positions(samples[:1]))[0][0], billion.last_use(0, 3, samples[-1:])[0])
    )
    drawn = np.concatenate([billion.draws(step).sample for step in range(start, stop + 1)])
    mine = drawn[(drawn >= first) & (drawn < first + SHARD_SAMPLES)]
    assert sorted(mine.tolist()) == samples.tolist()


def test_working_set_and_first_batch_follow_in_seconds_and_do_not_grow_with_the_release(billion: Order) -> None:
    shard_bytes = [[SHARD_SAMPLES * SAMPLE_BYTES] * NUM_SHARDS]
    began = time.process_time()
    found = open_blocks(billion, shard_bytes, block_bytes=2**20, ahead_steps=21)
    assert time.process_time() - began < 15
    # Two windows of every group, a third ahead, and what is lost by looking at neighbouring blocks together.
    assert 2 * 65_536 * SAMPLE_BYTES < found.bytes < 2.5 * 2 * 65_536 * SAMPLE_BYTES
    assert found.bytes < sum(shard_bytes[0]) / 1000
    first = step_fetch(billion, shard_bytes, block_bytes=2**20)
    assert first.blocks <= BATCH * 1.1


@pytest.mark.parametrize("groups", [16, 64])
def test_with_a_cache_of_the_working_set_the_data_are_fetched_once(groups: int) -> None:
    order = Order((200,) * 400, "v1", 0, 64, groups, open_samples=3200)
    per_block, ahead = 10, 3
    shard_bytes = [[200 * 1000] * 400]
    limit = open_blocks(order, shard_bytes, block_bytes=per_block * 1000, ahead_steps=ahead).blocks
    assert limit < 0.25 * 400 * 20
    fetched, cache = Counter[int](), OrderedDict[int, int]()
    until = order.last_use(0, 0, np.arange(order.num_samples)).reshape(-1, per_block).max(axis=1).tolist()
    for step in range(order.steps_per_epoch):
        for block in np.unique(order.draws(min(step + ahead, order.steps_per_epoch - 1)).sample // per_block).tolist():
            if block in cache:
                continue
            fetched[block] += 1
            cache[block] = until[block]
            if len(cache) > limit:
                # Only what nobody needs any more may go.
                oldest = min(cache, key=cache.__getitem__)
                assert cache.pop(oldest) < step
    assert set(fetched.values()) == {1}
    assert len(fetched) == order.num_samples // per_block
