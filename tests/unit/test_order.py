"""The order: every epoch a permutation, in ceil(N/B) batches, for any sizes; the same after any resume on any world."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draf_dist.data.order import Order, rank_entries
from draf_dist.data.permutation import permutation
from draf_dist.data.receipts import add_receipts, receipt
from draf_dist.data.shuffle_quality import shuffle_quality
from draf_dist.errors import SpecError
from draf_dist.noise import chain, hash64_np

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@st.composite
def orders(draw) -> Order:
    return Order(
        shard_sizes=tuple(draw(SHARDS)),
        release=draw(st.sampled_from(["v1", "v2"])),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        batch_size=draw(st.integers(1, 70)),
        groups=draw(st.integers(1, 70)),
        open_samples=draw(st.integers(1, 600)),
    )


def reference_epoch(order: Order, epoch: int) -> list[list[int]]:
    """The batches of an epoch, straight from docs/order.md: the whole epoch at once, nothing remembered."""

    def perm(n, purpose, index):
        key = chain(order.seed, order.release, epoch, purpose, index)
        return np.argsort(hash64_np(key, np.arange(n)), kind="stable")

    def shuffled(part, first, offset, purpose):
        cuts = [0, *range(offset or window, len(part), window), len(part)]
        return [part[a + i] for a, b in zip(cuts, cuts[1:], strict=False) for i in perm(b - a, purpose, first + a)]

    sizes, B = order.shard_sizes, order.batch_size
    N = sum(sizes)
    line = [sum(sizes[:s]) + i for s in perm(len(sizes), "shards", 0) for i in range(sizes[s])]
    G = min(order.groups, B, N)
    slot = [g * B // G for g in range(G + 1)]
    batches: list[list[int]] = [[] for _ in range(-(-N // B))]
    for g in range(G):
        first, last = N * slot[g] // B, N * slot[g + 1] // B
        window = max(1, min(order.open_samples // G, last - first))
        once = shuffled(line[first:last], first, 0, "first pass")
        twice = shuffled(once, first, window // 2, "second pass")
        for b, batch in enumerate(batches):
            batch += twice[b * (slot[g + 1] - slot[g]) : (b + 1) * (slot[g + 1] - slot[g])]
    return batches


@settings(max_examples=150, deadline=None)
@given(orders(), st.integers(0, 3))
def test_order_equals_the_short_reference(order: Order, epoch: int) -> None:
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    assert [order.draws(step).sample.tolist() for step in steps] == reference_epoch(order, epoch)


@settings(max_examples=150, deadline=None)
@given(orders(), st.integers(0, 3))
def test_every_epoch_is_a_permutation_in_batches_of_which_only_the_last_is_short(order: Order, epoch: int) -> None:
    N, B = order.num_samples, order.batch_size
    assert order.steps_per_epoch == -(-N // B)
    first = epoch * order.steps_per_epoch
    batches = [order.draws(first + b) for b in range(order.steps_per_epoch)]
    assert [len(batch.sample) for batch in batches[:-1]] == [B] * (order.steps_per_epoch - 1)
    assert sorted(np.concatenate([batch.sample for batch in batches]).tolist()) == list(range(N))
    assert {int(e) for batch in batches for e in batch.epoch} == {epoch}


@settings(max_examples=100, deadline=None)
@given(orders(), st.integers(0, 2), st.data())
def test_locate_is_the_inverse_of_draws(order: Order, epoch: int, data) -> None:
    step = epoch * order.steps_per_epoch + data.draw(st.integers(0, order.steps_per_epoch - 1))
    draws = order.draws(step)
    for entry in range(len(draws.sample)):
        assert order.locate(0, epoch, int(draws.sample[entry])) == (step, entry)


@settings(max_examples=100, deadline=None)
@given(orders(), st.data())
def test_a_run_killed_anywhere_and_resumed_on_another_world_reads_every_sample_once(order: Order, data) -> None:
    worlds = st.integers(1, order.batch_size)
    kill = data.draw(st.integers(0, order.steps_per_epoch))
    # A prefetcher that ran ahead before the kill leaves no trace: position is the optimizer's.
    for step in range(kill, min(kill + 3, order.steps_per_epoch)):
        order.draws(step)
    read: list[int] = []
    resumed = Order(order.shard_sizes, order.release, order.seed, order.batch_size, order.groups, order.open_samples)
    for plan, world, steps in (
        (order, data.draw(worlds), range(kill)),
        (resumed, data.draw(worlds), range(kill, order.steps_per_epoch)),
    ):
        for step in steps:
            sample = plan.draws(step).sample
            read += [int(s) for rank in range(world) for s in sample[rank_entries(len(sample), order.batch_size, rank, world)]]
    whole = [int(s) for step in range(order.steps_per_epoch) for s in order.draws(step).sample]
    assert read == whole


@given(st.integers(1, 500), st.data())
def test_ranks_differ_by_at_most_one_sample_and_share_nothing(batch_size: int, data) -> None:
    world = data.draw(st.integers(1, batch_size))
    entries = [e for rank in range(world) for e in range(batch_size)[rank_entries(batch_size, batch_size, rank, world)]]
    sizes = [len(range(batch_size)[rank_entries(batch_size, batch_size, rank, world)]) for rank in range(world)]
    assert entries == list(range(batch_size))
    assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_and_releases_have_orders_of_their_own() -> None:
    base = Order((50, 50), "v1", 0, 100)
    others = [Order((50, 50), "v2", 0, 100), Order((50, 50), "v1", 1, 100)]
    orders_seen = [base.draws(0), base.draws(1), *(other.draws(0) for other in others)]
    assert len({tuple(draws.sample) for draws in orders_seen}) == 4


def test_an_order_crosses_a_process_boundary_in_use() -> None:
    order = Order((30, 0, 12), "v1", 7, 8)
    order.draws(3)
    copy = pickle.loads(pickle.dumps(order))
    assert copy == order
    assert copy.draws(3).sample.tolist() == order.draws(3).sample.tolist()


def test_golden_order() -> None:
    order = Order((7, 0, 5, 9), "release-1", 42, 5, groups=2, open_samples=8)
    assert [order.draws(step).sample.tolist() for step in range(order.steps_per_epoch)] == GOLDEN_EPOCH_0
    assert order.draws(order.steps_per_epoch).sample.tolist() == GOLDEN_EPOCH_1_BATCH_0
    assert permutation(8, chain("perm")).tolist() == GOLDEN_PERMUTATION


def test_the_page_on_the_order_prints_the_golden_values() -> None:
    page = PAGE.read_text()
    assert " ".join(map(str, GOLDEN_EPOCH_0)) in page
    assert str(GOLDEN_EPOCH_1_BATCH_0) in page
    assert " ".join(map(str, GOLDEN_PERMUTATION)) in page


PAGE = Path(__file__).resolve().parents[2] / "docs/order.md"
GOLDEN_PERMUTATION = [5, 2, 1, 3, 6, 7, 0, 4]
GOLDEN_EPOCH_0 = [[8, 7, 3, 6, 15], [1, 9, 14, 5, 4], [10, 11, 13, 16, 17], [0, 2, 12, 19, 18], [20]]
GOLDEN_EPOCH_1_BATCH_0 = [13, 14, 1, 0, 2]


@pytest.mark.parametrize(
    ("groups", "shards_per_window", "expected"),
    [(64, 4, 1.07), (16, 1, 10.6)],
    ids=["many groups, four shards a window", "few groups, one shard a window"],
)
def test_shuffle_is_near_perfect_with_many_groups_even_with_shards_sorted_by_site(groups, shards_per_window, expected) -> None:
    shard, num_shards, batch_size = 128, 512, 320
    order = Order((shard,) * num_shards, "v1", 0, batch_size, groups, groups * shards_per_window * shard)
    site = np.repeat(np.arange(4), num_shards // 4 * shard)
    quality = np.mean([shuffle_quality(order, site, epoch=epoch) for epoch in range(8)])
    assert quality == pytest.approx(expected, rel=0.1)


def test_an_order_that_holds_every_sample_open_is_a_full_shuffle() -> None:
    order = Order((64,) * 64, "v1", 3, 128, groups=1, open_samples=4096)
    site = np.repeat(np.arange(4), 1024)
    quality = np.mean([shuffle_quality(order, site, epoch=epoch) for epoch in range(12)])
    assert quality == pytest.approx(1, abs=0.15)


def test_memory_is_bounded_by_the_open_samples() -> None:
    order = Order((1000,) * 100, "v1", 0, 256, groups=16, open_samples=1600)
    for step in range(order.steps_per_epoch):
        order.draws(step)
    held = sum(len(samples) for samples in order._open._values.values())
    assert held <= 3 * 1600


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"groups": 0}, {"open_samples": 0}, {"shard_sizes": (0, 0)}])
def test_impossible_orders_are_refused(changes) -> None:
    with pytest.raises(SpecError, match="expected at least"):
        Order(**({"shard_sizes": (4,), "release": "v1", "seed": 0, "batch_size": 2} | changes))


def test_more_ranks_than_entries_are_refused() -> None:
    with pytest.raises(SpecError, match="fewer ranks"):
        rank_entries(4, 4, 0, 5)


@given(st.lists(st.integers(0, 2**63 - 1), max_size=30), st.integers(0, 30))
def test_receipts_of_parts_add_up_to_that_of_the_whole_in_any_order(uids, cut) -> None:
    whole = receipt(np.array(uids, np.int64))
    parts = [receipt(np.array(part, np.int64)) for part in (uids[cut:], uids[:cut])]
    assert add_receipts(*parts) == whole
    assert whole.count == len(uids)


def test_padding_is_never_in_a_receipt() -> None:
    assert receipt(np.array([5, -1, 9, -1])) == receipt(np.array([9, 5]))
    assert receipt(np.array([5, 5])) != receipt(np.array([5]))
    assert receipt(np.array([5, 8])) != receipt(np.array([6, 7]))


def test_golden_receipt() -> None:
    # hash64(0, 0) and hash64(0, 1) are the first outputs of the public splitmix64 with seed 0.
    assert receipt(np.array([0, 1])).uid_sum == f"{(0xE220A8397B1DCDAF + 0x6E789E6AA1B965F4) % 2**64:016x}"


def test_a_draw_repeats_only_in_another_epoch() -> None:
    order = Order((9, 4), "v1", 1, 4)
    drawn = Counter(
        (int(e), int(s)) for step in range(3 * order.steps_per_epoch) for e, s in zip(*_columns(order, step), strict=True)
    )
    assert set(drawn.values()) == {1}
    assert len(drawn) == 3 * 13


def _columns(order: Order, step: int) -> tuple[np.ndarray, np.ndarray]:
    draws = order.draws(step)
    return draws.epoch, draws.sample
