"""Learning rate, saves and early stopping."""

import math

import pytest

from draf_dist.training.schedule import EarlyStopping, SaveGrid, WarmupCosine


def test_the_rate_rises_linearly_to_its_peak_and_falls_as_a_cosine_to_zero() -> None:
    rate = WarmupCosine(peak=0.4, num_steps=104, warmup_fraction=4 / 104)
    assert [rate(t) for t in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rate(4) == 0.4
    assert rate(54) == pytest.approx(0.2)
    assert rate(104) == pytest.approx(0.0)
    assert rate(29) == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)) / 2)


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert WarmupCosine(peak=1e-3, num_steps=10, warmup_fraction=0.0)(0) == 1e-3


def test_a_run_of_one_step_is_a_schedule() -> None:
    assert WarmupCosine(peak=1.0, num_steps=1, warmup_fraction=0.05)(0) == 1.0


def test_saves_are_counted_within_the_epoch() -> None:
    """Counted over the run, every_steps of 4 and epochs of 6 would give 4, 6, 8, 12: two saves for one."""
    grid = SaveGrid(every_steps=4, steps_per_epoch=6)
    assert [step for step in range(1, 25) if grid.last(step) == step] == [4, 6, 10, 12, 16, 18, 22, 24]
    assert [grid.last(step) for step in range(13)] == [0, 0, 0, 0, 4, 4, 6, 6, 6, 6, 10, 10, 12]


@pytest.mark.parametrize(("every", "epoch"), [(1, 5), (3, 5), (5, 5), (7, 5), (2, 6), (10**6, 9)])
def test_no_save_is_further_from_the_next_than_it_may_be(every: int, epoch: int) -> None:
    grid = SaveGrid(every, epoch)
    assert max(step - grid.last(step) for step in range(5 * epoch)) == min(every, epoch) - 1
    assert all(grid.last(done * epoch) == done * epoch for done in range(5))


def test_training_stops_after_patience_epochs_without_a_new_best() -> None:
    state = EarlyStopping(patience=2)
    for step, nll in ((10, 0.7), (20, 0.6), (30, 0.65)):
        state = state.after(nll, step)
        assert not state.exhausted
    state = state.after(0.6, 40)
    assert state.exhausted
    assert (state.best_loss, state.best_step) == (0.6, 20)


def test_a_nan_is_never_the_best() -> None:
    assert EarlyStopping(patience=3).after(math.nan, 1).best_loss is None
    assert EarlyStopping(patience=3).after(0.5, 1).after(math.nan, 2).best_step == 1
