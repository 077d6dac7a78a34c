"""Mixtures: in proportion at every prefix, exact epochs of every source, invertible."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draf_dist.data.mixture import Mixture, chairman_table
from draf_dist.data.order import Order, rank_entries
from draf_dist.errors import SpecError

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=6).map(tuple)


@st.composite
def mixtures(draw) -> Mixture:
    weights = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    sizes = st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(lambda shards: sum(shards) > 0)
    orders = tuple(
        Order(tuple(draw(sizes)), f"v{i}", draw(st.integers(0, 9)), 4, groups=draw(st.integers(1, 9)), open_samples=32)
        for i in range(len(weights))
    )
    return Mixture(orders, weights, draw(st.integers(1, 24)))


def reference_table(weights: tuple[int, ...]) -> list[int]:
    """Earliest deadline first with Python integers, as docs/order.md writes it."""
    D = sum(weights)
    drawn = [0] * len(weights)
    table = []
    for t in range(D):
        candidates = [(-(-(n + 1) * D // w), i) for i, (n, w) in enumerate(zip(drawn, weights, strict=True)) if n * D // w <= t]
        source = min(candidates)[1]
        table.append(source)
        drawn[source] += 1
    return table


@settings(deadline=None)
@given(WEIGHTS)
def test_every_prefix_is_less_than_one_sample_from_proportion(weights) -> None:
    table = chairman_table(weights)
    assert table.tolist() == reference_table(weights)
    counts = np.cumsum(table[:, None] == np.arange(len(weights)), axis=0)
    # Integers: D |count - t w / D| < D.
    error = np.abs(counts * sum(weights) - np.arange(1, sum(weights) + 1)[:, None] * np.array(weights))
    assert error.max() < sum(weights)
    assert counts[-1].tolist() == list(weights)


def test_the_longest_period_stays_in_proportion() -> None:
    weights = (6_001, 2_998, 997, 3, 1)
    counts = np.cumsum(chairman_table(weights)[:, None] == np.arange(5), axis=0)
    assert np.abs(counts * 10_000 - np.arange(1, 10_001)[:, None] * np.array(weights)).max() < 10_000


@settings(max_examples=60, deadline=None)
@given(mixtures())
def test_every_epoch_of_every_source_is_a_permutation_and_batches_are_full(mixture: Mixture) -> None:
    drawn: dict[tuple[int, int], list[int]] = {}
    counts = [0] * len(mixture.orders)
    for step in range(25):
        draws = mixture.draws(step)
        assert len(draws.sample) == mixture.batch_size
        assert np.all(np.diff(draws.source) >= 0)
        for source, epoch, sample in zip(draws.source.tolist(), draws.epoch.tolist(), draws.sample.tolist(), strict=True):
            # The c-th draw of a source is of its epoch c // N.
            assert epoch == counts[source] // mixture.orders[source].num_samples
            counts[source] += 1
            drawn.setdefault((source, epoch), []).append(sample)
        total, D = (step + 1) * mixture.batch_size, sum(mixture.weights)
        assert all(abs(n * D - total * w) < D for n, w in zip(counts, mixture.weights, strict=True))
    for (source, epoch), samples in drawn.items():
        assert len(set(samples)) == len(samples)
        if (source, epoch + 1) in drawn:
            assert sorted(samples) == list(range(mixture.orders[source].num_samples))


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(0, 40))
def test_locate_is_the_inverse_of_draws(mixture: Mixture, step: int) -> None:
    draws = mixture.draws(step)
    for entry in range(mixture.batch_size):
        found = mixture.locate(int(draws.source[entry]), int(draws.epoch[entry]), int(draws.sample[entry]))
        assert found == (step, entry)


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.data())
def test_ranks_of_any_world_together_read_the_batch(mixture: Mixture, data) -> None:
    B = mixture.batch_size
    world = data.draw(st.integers(1, B))
    sample = mixture.draws(data.draw(st.integers(0, 30))).sample
    parts = [sample[rank_entries(B, B, rank, world)] for rank in range(world)]
    assert np.concatenate(parts).tolist() == sample.tolist()


def test_a_mixture_of_one_release_in_whole_batches_is_its_order() -> None:
    order = Order((20, 12), "v1", 5, 8)
    mixture = Mixture((order,), (3,), 8)
    for step in range(10):
        assert mixture.draws(step).sample.tolist() == order.draws(step).sample.tolist()
        assert mixture.draws(step).epoch.tolist() == order.draws(step).epoch.tolist()


def test_golden_mixture() -> None:
    assert chairman_table((3, 2, 1)).tolist() == GOLDEN_TABLE
    mixture = Mixture((Order((4, 3), "a", 1, 1), Order((5,), "b", 1, 1)), (2, 1), 6)
    draws = mixture.draws(2)
    assert [draws.source.tolist(), draws.epoch.tolist(), draws.sample.tolist()] == GOLDEN_DRAWS
    page = (Path(__file__).resolve().parents[2] / "docs/order.md").read_text()
    assert " ".join(map(str, GOLDEN_TABLE)) in page
    assert all(str(column) in page for column in GOLDEN_DRAWS)


GOLDEN_TABLE = [0, 1, 0, 1, 0, 2]
GOLDEN_DRAWS = [[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 1], [2, 3, 5, 1, 2, 1]]


@pytest.mark.parametrize("weights", [(), (1,), (1, 0), (9_999, 2), (1, 1, 1)])
def test_impossible_weights_are_refused(weights) -> None:
    order = Order((4,), "v1", 0, 2)
    with pytest.raises(SpecError, match="small integers"):
        Mixture((order, order), weights, 4)
