"""The horizon: never a step too early, less than two windows late, and no permutation computed."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import draf_dist.data.order as order_module
from draf_dist.data.mixture import Mixture
from draf_dist.data.order import Order

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@st.composite
def orders(draw: st.DrawFn, batch_size: int | None = None) -> Order:
    return Order(
        shard_sizes=tuple(draw(SHARDS)),
        release=draw(st.sampled_from(["v1", "v2"])),
        seed=draw(st.integers(0, 99)),
        batch_size=batch_size or draw(st.integers(1, 70)),
        groups=draw(st.integers(1, 70)),
        open_samples=draw(st.integers(1, 600)),
    )


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    weights = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    return Mixture(tuple(draw(orders(1)) for _ in weights), weights, draw(st.integers(1, 24)))


def windows_late(order: Order, epoch: int) -> np.ndarray:
    """Steps of the order that two windows are worth, for every sample."""
    horizon = order.horizon(0, epoch)
    group = horizon.groups.of(horizon.line.positions(np.arange(order.num_samples)))
    slots = np.diff(horizon.groups.slot_starts)[group]
    return -(-(2 * horizon.groups.window[group] - 1) // slots)


@settings(max_examples=80, deadline=None)
@given(orders(), st.integers(0, 3))
def test_a_sample_is_drawn_by_its_last_use_and_at_most_two_windows_before(order: Order, epoch: int) -> None:
    samples = np.arange(order.num_samples)
    exact = np.array([order.locate(0, epoch, sample)[0] for sample in samples.tolist()])
    late = order.last_use(0, epoch, samples) - exact
    assert late.min() >= 0
    assert np.all(late <= windows_late(order, epoch))


@settings(max_examples=80, deadline=None)
@given(orders(), st.integers(0, 3))
def test_no_sample_is_drawn_outside_its_span(order: Order, epoch: int) -> None:
    horizon = order.horizon(0, epoch)
    first, last = horizon.span(horizon.line.positions(np.arange(order.num_samples)))
    start = epoch * order.steps_per_epoch
    for step in range(start, start + order.steps_per_epoch):
        drawn = order.draws(step).sample
        assert np.all(first[drawn] <= step)
        assert np.all(step <= last[drawn])
    assert first.min() >= start
    assert last.max() == start + order.steps_per_epoch - 1


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.data())
def test_a_mixture_draws_every_sample_by_its_last_use_also_where_a_short_source_has_many_epochs(mixture: Mixture, data) -> None:
    B, D = mixture.batch_size, sum(mixture.weights)
    for source, (order, weight) in enumerate(zip(mixture.cut_orders, mixture.weights, strict=True)):
        epoch = data.draw(st.integers(0, 40))
        samples = np.arange(order.num_samples)
        exact = np.array([mixture.locate(source, epoch, sample)[0] for sample in samples.tolist()])
        late = mixture.last_use(source, epoch, samples) - exact
        # Draws of the source, of which every period of D has `weight`; a step more as batches of the mixture are cut elsewhere.
        draws = (windows_late(order, epoch) + 1) * order.batch_size
        assert late.min() >= 0
        assert np.all(late <= (draws / weight + 1) * D / B + 1)


def test_the_batches_of_a_mixture_lie_within_the_spans_of_their_epochs() -> None:
    mixture = Mixture((Order((9, 0, 14), "a", 1, 1, open_samples=12), Order((5,), "b", 1, 1)), (1, 3), 8)
    for step in range(30):
        draws = mixture.draws(step)
        for source, epoch, sample in zip(draws.source.tolist(), draws.epoch.tolist(), draws.sample.tolist(), strict=True):
            horizon = mixture.horizon(source, epoch)
            first, last = horizon.span(horizon.line.positions(np.array([sample])))
            assert first[0] <= step <= last[0]


@settings(deadline=None)
@given(orders(), st.integers(0, 3))
def test_positions_of_the_line_and_samples_are_each_others_inverse(order: Order, epoch: int) -> None:
    line = order.horizon(0, epoch).line
    positions = np.arange(order.num_samples)
    assert line.positions(line.samples(positions)).tolist() == positions.tolist()


def test_a_million_samples_take_well_under_a_second_and_no_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order((10_000,) * 10_000, "v1", 0, 256)
    samples = np.arange(0, order.num_samples, 100)
    order.last_use(0, 0, samples[:1])

    def refuse(size: int, key: int) -> None:
        raise AssertionError("a permutation was computed")

    monkeypatch.setattr(order_module, "permutation", refuse)
    began = time.process_time()
    order.last_use(0, 0, samples)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(("source", "epoch", "sample"), [(1, 0, 0), (0, -1, 0), (0, 0, -1), (0, 0, 21)])
def test_what_is_not_in_the_order_has_no_last_use(source: int, epoch: int, sample: int) -> None:
    with pytest.raises(ValueError, match="no such"):
        Order((7, 0, 5, 9), "v1", 0, 4).last_use(source, epoch, np.array([sample]))


def test_nothing_has_no_last_use() -> None:
    assert Order((4,), "v1", 0, 2).last_use(0, 0, np.zeros(0, np.int64)).tolist() == []
