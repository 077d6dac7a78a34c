"""Successive halving from a table: the same decisions as Ray Tune's, and the same again from what was written down."""

from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from draf_dist.tuning.campaign_job import Stopping
from draf_dist.tuning.rungs import Rungs, milestones

STOPPING = Stopping(grace_epochs=1, reduction_factor=3)


def run(rungs: Rungs, curves: np.ndarray, order: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Which trial was stopped after which epoch, when epochs are reported in this order."""
    stopped: list[tuple[int, int]] = []
    for trial, epoch in order:
        if rungs.stopped(trial, epoch):
            continue
        entry = rungs.decide(trial, epoch, float(curves[trial, epoch - 1]))
        if entry is not None:
            rungs.enter(entry)
            stopped += [(trial, epoch)] if entry.stopped else []
    return stopped


def raced(seed: int, num_trials: int, epochs: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Falling curves, and an order in which trials that run at the same time may report."""
    generator = np.random.default_rng(seed)
    curves = generator.random((num_trials, 1)) + np.linspace(1, 0, epochs) + 0.3 * generator.random((num_trials, epochs))
    clock = generator.random((num_trials, epochs)).cumsum(axis=1) + np.arange(num_trials)[:, None]
    order = [(int(i) // epochs, int(i) % epochs + 1) for i in np.argsort(clock, axis=None)]
    return curves, order


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stopping", [STOPPING, Stopping(grace_epochs=2, reduction_factor=2)])
def test_decisions_are_those_of_ray_tune(seed: int, stopping: Stopping) -> None:
    curves, order = raced(seed, num_trials=20, epochs=10)
    grace, factor = stopping.grace_epochs, stopping.reduction_factor
    oracle = AsyncHyperBandScheduler("epoch", "value", "min", max_t=11, grace_period=grace, reduction_factor=factor)
    trials = [SimpleNamespace(trial_id=str(number)) for number in range(20)]
    for trial in trials:
        oracle.on_trial_add(None, trial)
    expected: list[tuple[int, int]] = []
    for number, epoch in order:
        if number not in {stopped for stopped, _ in expected}:
            result = {"epoch": epoch, "value": float(curves[number, epoch - 1])}
            if oracle.on_trial_result(None, trials[number], result) == TrialScheduler.STOP:
                expected.append((number, epoch))
    assert 5 < len(expected) < 20
    assert run(Rungs(stopping, 11), curves, order) == expected


def test_a_table_that_is_read_again_decides_as_if_nothing_had_happened() -> None:
    curves, order = raced(7, num_trials=12, epochs=9)
    whole = Rungs(STOPPING, 9)
    expected = run(whole, curves, order)
    for cut in range(0, len(order), 7):
        before = Rungs(STOPPING, 9)
        first = run(before, curves, order[:cut])
        after = Rungs(STOPPING, 9, list(before._entries.values()))
        # What was reported shortly before the driver died is reported again.
        assert first + run(after, curves, order[max(0, cut - 5) :]) == expected


def test_a_stopped_trial_stays_stopped_when_it_is_read_again() -> None:
    rungs = Rungs(STOPPING, 9)
    for trial, value in ((0, 0.1), (1, 0.9)):
        rungs.enter(rungs.decide(trial, 1, value))
    again = Rungs(STOPPING, 9, list(rungs._entries.values()))
    assert [again.stopped(trial, 1) for trial in (0, 1)] == [False, True]
    assert again.decide(1, 1, 0.0) is None


def test_a_trial_that_is_continued_stops_where_it_did_before() -> None:
    rungs = Rungs(STOPPING, 9)
    for trial, value in ((0, 0.1), (1, 0.1)):
        rungs.enter(rungs.decide(trial, 1, value))
    for trial, value in ((0, 0.1), (1, 0.2)):
        rungs.enter(rungs.decide(trial, 3, value))
    # Not at the first epoch that it reports again: what is written down of it would be too old.
    assert [rungs.stopped(1, epoch) for epoch in (1, 2, 3, 4)] == [False, False, True, True]


def test_a_trial_stands_at_a_rung_once() -> None:
    rungs = Rungs(STOPPING, 9)
    entry = rungs.decide(0, 1, 0.5)
    rungs.enter(entry)
    with pytest.raises(ValueError, match="already"):
        rungs.enter(entry)


def test_there_is_no_rung_at_the_last_epoch_and_none_without_stopping() -> None:
    assert milestones(STOPPING, 9) == (1, 3)
    assert milestones(STOPPING, 10) == (1, 3, 9)
    assert milestones(Stopping(grace_epochs=5), 5) == ()
    assert Rungs(None, 100).decide(0, 50, 1.0) is None


def test_a_trial_that_ends_sooner_than_others_stands_at_no_rung_from_its_end_on() -> None:
    rungs = Rungs(STOPPING, 30)
    assert rungs.decide(0, 3, 0.5, last=4) is not None
    at_end = rungs.decide(0, 3, 0.5, last=3)
    assert at_end is not None
    assert at_end.rung == 1
    assert rungs.decide(0, 1, 0.5, last=1) is None
