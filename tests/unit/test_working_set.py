"""The working set: never less than what the fetching rule holds on real indexes, and not much more."""

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from sharded import order_of, sharded_release

from draf_dist.data.mixture import Mixture
from draf_dist.data.order import Order, TrainingOrder
from draf_dist.data.working_set import epoch_fetch, open_blocks, step_fetch, working_set

# Of every source: the bytes [start, stop) of each sample, in its shard.
Extents = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def most_held(
    plan: TrainingOrder, extents: Extents, shard_bytes: list[list[int]], *, block_bytes: int, ahead: int, steps: int
) -> int:
    """The most bytes that the fetching rule holds in the first steps, walked through with the exact draws."""
    first: dict[tuple[int, int, int, int], int] = {}
    last: dict[tuple[int, int, int, int], int] = defaultdict(int)
    for step in range(steps + ahead):
        draws = plan.draws(step)
        for key in zip(draws.source.tolist(), draws.epoch.tolist(), draws.sample.tolist(), strict=True):
            for block in blocks_of(key[0], key[2], extents, block_bytes):
                first.setdefault((key[0], key[1], *block), step)
    epochs = {key[:2] for key in first}
    for source, epoch in epochs:
        samples = np.arange(len(extents[source][0]))
        for sample, use in zip(samples.tolist(), plan.last_use(source, epoch, samples).tolist(), strict=True):
            for block in blocks_of(source, sample, extents, block_bytes):
                last[source, epoch, *block] = max(last[source, epoch, *block], use)
    # A block that two epochs need is held once.
    held = [set() for _ in range(steps)]
    for key, start in first.items():
        for step in range(max(0, start - ahead), min(steps, last[key] + 1)):
            held[step].add((key[0], *key[2:]))
    sizes = [[min(block_bytes, shard_bytes[s][k] - b * block_bytes) for s, k, b in blocks] for blocks in held]
    return max(map(sum, sizes))


def blocks_of(source: int, sample: int, extents: Extents, block_bytes: int) -> list[tuple[int, int]]:
    shard, start, stop = (int(column[sample]) for column in extents[source])
    return [(shard, block) for block in range(start // block_bytes, -(-stop // block_bytes))]


def varied(shard_sizes: tuple[int, ...], seed: int) -> tuple[tuple[np.ndarray, ...], list[int]]:
    """Extents of samples as hospitals have them: images of very different sizes, a third of the samples without one."""
    random = np.random.default_rng(seed)
    columns: list[list[np.ndarray]] = [[], [], []]
    shard_bytes = []
    for shard, size in enumerate(shard_sizes):
        length = (512 * (4 + random.lognormal(4, 0.8, size) * (random.random(size) > 0.3))).astype(np.int64)
        stop = np.cumsum(length)
        for column, values in zip(columns, (np.full(size, shard), stop - length, stop), strict=True):
            column.append(values)
        shard_bytes.append(int(stop[-1] if size else 0) + 1024)
    return tuple(np.concatenate(column) for column in columns), shard_bytes


@pytest.mark.parametrize("block_bytes", [2**14, 2**18])
@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize(("batch_size", "groups", "open_samples"), [(32, 8, 512), (16, 16, 256), (24, 64, 100), (64, 4, 4096)])
def test_what_the_rule_holds_is_within_the_bound_and_at_least_two_fifths_of_it(
    batch_size: int, groups: int, open_samples: int, ahead: int, block_bytes: int
) -> None:
    order = Order((90, 0, 110, 70, 1, 100) * 6, "v1", 5, batch_size, groups, open_samples)
    extents, shard_bytes = varied(order.shard_sizes, seed=1)
    steps = 2 * order.steps_per_epoch
    held = most_held(order, [extents], [shard_bytes], block_bytes=block_bytes, ahead=ahead, steps=steps)
    bound = working_set(order, [shard_bytes], block_bytes=block_bytes, ahead_steps=ahead)
    assert 0.4 * bound <= held <= bound


def even(shard_sizes: tuple[int, ...], sample_bytes: Sequence[int]) -> tuple[tuple[np.ndarray, ...], list[int]]:
    """Extents of samples that are equally large in each shard."""
    shard = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    row = np.concatenate([np.arange(size) for size in shard_sizes])
    length = np.array(sample_bytes)[shard]
    return (shard, row * length, (row + 1) * length), [n * size for n, size in zip(shard_sizes, sample_bytes, strict=True)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("sizes", "batch_size", "open_samples", "every", "times"), [((20,) * 100, 32, 160, 25, 50), ((40,) * 80, 16, 40, 10, 5)]
)
def test_shards_that_differ_in_bytes_a_sample_stay_within_the_bound_in_every_epoch(
    sizes: tuple[int, ...], batch_size: int, open_samples: int, every: int, times: int, seed: int
) -> None:
    order = Order(sizes, f"v{seed}", seed, batch_size, groups=8, open_samples=open_samples)
    extents, shard_bytes = even(sizes, [400 * (times if k % every == 0 else 1) for k in range(len(sizes))])
    bound = working_set(order, [shard_bytes], block_bytes=400, ahead_steps=2)
    assert most_held(order, [extents], [shard_bytes], block_bytes=400, ahead=2, steps=8 * order.steps_per_epoch) <= bound


def test_which_shards_differ_changes_nothing_and_the_whole_is_never_exceeded() -> None:
    order = Order((100,) * 400, "v1", 0, 32, 16, 1024)
    sizes = np.where(np.arange(400) % 20 == 0, 20_000_000, 4_000_000)
    found = {
        working_set(order, [np.random.default_rng(seed).permutation(sizes).tolist()], block_bytes=2**20, ahead_steps=5)
        for seed in range(5)
    }
    assert len(found) == 1
    assert found.pop() < sizes.sum()
    # Of many shards hardly any order has more than a share of the large ones at once.
    alike, mixed = (
        working_set(Order((500,) * 20_000, "v1", 0, 256), [shards], block_bytes=2**20, ahead_steps=5)
        for shards in ([2**25] * 20_000, [2**25, 2**25, 2**25, 2**27] * 5000)
    )
    mean = 7 / 4
    assert mean * alike < mixed < 1.4 * mean * alike


def test_where_an_epoch_ends_the_blocks_of_the_next_count_too() -> None:
    order, ahead, sample_bytes = Order((1000,) * 30, "v1", 1, 800, groups=2, open_samples=4000), 3, 40
    change = np.zeros(2 * order.steps_per_epoch + 1, np.int64)
    for epoch in range(2):
        first, last = order.horizon(0, epoch).span(np.arange(order.num_samples))
        np.add.at(change, np.maximum(first - ahead, 0), sample_bytes)
        np.subtract.at(change, last + 1, sample_bytes)
    # All that may be drawn within reach: much more than inside of an epoch.
    open_bytes = np.cumsum(change)
    border = slice(order.steps_per_epoch - ahead, order.steps_per_epoch)
    assert open_bytes[border].max() > 1.1 * open_bytes[: border.start].max()
    bound = working_set(order, [[1000 * sample_bytes] * 30], block_bytes=500, ahead_steps=ahead)
    assert open_bytes.max() <= bound <= 1.1 * open_bytes.max()


def test_on_the_indexes_of_a_real_release(tmp_path: Path) -> None:
    release = sharded_release(tmp_path)
    shards = release.shards("train")
    extents = [(k, *index.extent(i)) for k, index in enumerate(map(release.index, shards)) for i in range(index.num_samples)]
    order = order_of(release)
    shard_bytes = [shard.size_bytes for shard in shards]
    columns = tuple(np.array(column) for column in zip(*extents, strict=True))
    held = most_held(order, [columns], [shard_bytes], block_bytes=4096, ahead=1, steps=2 * order.steps_per_epoch)
    bound = working_set(order, [shard_bytes], block_bytes=4096, ahead_steps=1)
    assert 0.45 * bound <= held <= bound


@pytest.mark.parametrize(("weights", "ahead"), [((1, 1), 2), ((5, 2), 0), ((1, 3), 4)])
def test_of_a_mixture_whose_short_source_has_many_epochs(weights: tuple[int, int], ahead: int) -> None:
    orders = (Order((60, 80, 0, 70) * 6, "a", 1, 1, 8, 128), Order((30, 41), "b", 1, 1, 8, 16))
    mixture = Mixture(orders, weights, 24)
    both = [varied(order.shard_sizes, seed) for seed, order in enumerate(orders)]
    extents, shard_bytes = [extents for extents, _ in both], [sizes for _, sizes in both]
    held = most_held(mixture, extents, shard_bytes, block_bytes=2**15, ahead=ahead, steps=mixture.steps_per_epoch)
    found = open_blocks(mixture, shard_bytes, block_bytes=2**15, ahead_steps=ahead)
    assert 0.45 * found.bytes <= held <= found.bytes
    assert sum(found.by_source) == found.bytes


def test_the_working_set_is_never_more_than_the_release() -> None:
    order = Order((7, 0, 5, 9), "v1", 0, 4)
    assert working_set(order, [[4000, 1024, 3000, 5000]], block_bytes=1000, ahead_steps=2) == 12_000
    assert open_blocks(order, [[4000, 1024, 3000, 5000]], block_bytes=1000, ahead_steps=50).blocks == 12


def test_fewer_open_samples_need_fewer_bytes() -> None:
    sizes, shard_bytes = (500,) * 200, [[500 * 40_000] * 200]
    few, many = (working_set(Order(sizes, "v1", 0, 64, 16, n), shard_bytes, block_bytes=2**20, ahead_steps=2) for n in (1600, 6400))
    # Two windows of every group are open, and what ahead_steps bring.
    assert 2 * 1600 * 40_000 < few < many / 2
    assert 2 * 6400 * 40_000 < many < 3.5 * 6400 * 40_000


def test_neighbouring_blocks_are_looked_at_together_where_there_are_very_many(monkeypatch: pytest.MonkeyPatch) -> None:
    order, shard_bytes = Order((500,) * 200, "v1", 0, 64, 16, 6400), [[500 * 40_000] * 200]
    exact = open_blocks(order, shard_bytes, block_bytes=2**17, ahead_steps=2)
    monkeypatch.setattr("draf_dist.data.working_set.MAX_PIECES", 4000)
    joined = open_blocks(order, shard_bytes, block_bytes=2**17, ahead_steps=2)
    assert exact.bytes < joined.bytes < 1.3 * exact.bytes


def test_ten_thousand_shards_take_a_second() -> None:
    order, shard_bytes = Order((700,) * 10_000, "v1", 0, 256), [[2**25] * 10_000]
    began = time.process_time()
    open_blocks(order, shard_bytes, block_bytes=2**20, ahead_steps=8)
    assert time.process_time() - began < 5


def test_an_epoch_fetches_every_block_of_every_shard_with_samples_once() -> None:
    fetch = epoch_fetch([3, 0, 5], [2500, 1024, 3000], 1000)
    assert (fetch.bytes, fetch.blocks) == (5500, 6)


def test_the_first_batch_fetches_each_of_its_blocks_once() -> None:
    order = Order((8, 0, 8), "v1", 0, 16, open_samples=4)
    # All there is: samples of 500 bytes, two in a block; and one sample that takes several blocks.
    assert step_fetch(order, [[4000, 1024, 4000]], block_bytes=1000).bytes == 8000
    assert step_fetch(order, [[4000, 1024, 4000]], block_bytes=1000).blocks == 8
    large = step_fetch(Order((2,), "v1", 0, 1), [[9000]], block_bytes=1000)
    assert (large.bytes, large.blocks) == (5000, 5)


def test_the_first_batch_of_samples_far_apart_fetches_a_block_for_each() -> None:
    order = Order((100,) * 100, "v1", 0, 32, open_samples=3200)
    drawn = order.draws(0).sample
    blocks = {(sample // 100, sample % 100 // 10) for sample in drawn.tolist()}
    fetch = step_fetch(order, [[100_000] * 100], block_bytes=10_000)
    assert (fetch.blocks, fetch.bytes) == (len(blocks), len(blocks) * 10_000)
