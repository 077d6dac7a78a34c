"""Survival metrics: values worked out by hand (O14 among them), and every definition written out pair by pair."""

import itertools
import time as clock

import numpy as np
import pytest
from numpy.typing import NDArray

from draf_dist.metrics import survival
from draf_dist.metrics.survival import Censoring

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
HAZARD = np.array([[0.1, 0.2, 0.3, 0.4]])


def draw(seed: int, n: int = 60, levels: int = 12) -> tuple[Floats, Flags, Floats]:
    """Times, events and risks on a few levels: ties of both are where these metrics go wrong."""
    generator = np.random.default_rng(seed)
    return (
        generator.integers(1, levels, n).astype(float),
        generator.random(n) < 0.6,
        generator.integers(0, levels, n).astype(float),
    )


def by_pairs(time: Floats, event: Flags, risk: Floats, weight: Floats) -> float:
    won = comparable = 0.0
    for i, j in itertools.permutations(range(len(time)), 2):
        if event[i] and (time[j] > time[i] or (time[j] == time[i] and not event[j])):
            comparable += weight[i]
            won += weight[i] * (1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0)
    return won / comparable


def censoring_by_hand(time: Floats, event: Flags, at: float) -> float:
    """G(at), one study after the other: events of a time leave before anyone is censored then."""
    left = 1.0
    for u in sorted(set(time[time <= at])):
        censored = np.sum((time == u) & ~event)
        at_risk = np.sum(time >= u) - np.sum((time == u) & event)
        left *= 1 - censored / at_risk if at_risk else 1.0
    return left


def test_oracle_survival_and_risk() -> None:
    assert survival.survival_function(HAZARD)[0] == pytest.approx([0.9, 0.72, 0.504, 0.3024], abs=1e-9)
    assert survival.risk(HAZARD) == pytest.approx([-2.4264], abs=1e-9)


def test_oracle_likelihood_of_an_event_and_of_a_censored_time() -> None:
    third = np.array([2])
    died = survival.survival_negative_log_likelihood(HAZARD, third, np.array([True]))
    seen = survival.survival_negative_log_likelihood(HAZARD, third, np.array([False]))
    assert died == pytest.approx(1.5324769, abs=1e-6)
    assert (1 - 0.4) * seen == pytest.approx(0.4111074, abs=1e-6)


def test_a_likelihood_sums_to_one_over_all_that_can_happen() -> None:
    """An event in any of the intervals, or none by the end of the last."""
    hazard = np.repeat(HAZARD, 4, axis=0)
    died = [survival.survival_negative_log_likelihood(HAZARD, np.array([k]), np.array([True])) for k in range(4)]
    assert np.exp(-np.array(died)).sum() + survival.survival_function(hazard)[0, -1] == pytest.approx(1.0)


def test_survival_between_edges_falls_at_a_constant_hazard() -> None:
    edges = np.array([10.0, 20.0, 40.0])
    found = survival.survival_at(HAZARD, edges, np.array([0.0, 5.0, 10.0, 20.0, 30.0, 40.0, 40.5]))[0]
    assert found[:6] == pytest.approx([1, 0.9**0.5, 0.9, 0.72, 0.72 * 0.7**0.5, 0.504])
    assert np.isnan(found[6])


@pytest.mark.parametrize("seed", range(8))
def test_harrell_by_pairs_with_ties_of_time_and_of_risk(seed: int) -> None:
    time, event, risk = draw(seed)
    assert survival.concordance_index(time, event, risk) == pytest.approx(by_pairs(time, event, risk, np.ones(60)), abs=1e-12)


def test_ties_as_documented() -> None:
    yes, no = True, False
    one = np.array([1.0, 1.0])
    assert np.isnan(survival.concordance_index(one, np.array([yes, yes]), np.array([1.0, 2.0])))
    assert survival.concordance_index(one, np.array([yes, no]), np.array([2.0, 1.0])) == 1.0
    assert survival.concordance_index(one, np.array([no, yes]), np.array([2.0, 1.0])) == 0.0
    assert survival.concordance_index(np.array([1.0, 2.0]), np.array([yes, no]), one) == 0.5
    assert np.isnan(survival.concordance_index(np.array([1.0, 2.0]), np.array([no, yes]), one))
    assert np.isnan(survival.concordance_index(np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0)))


def test_the_order_of_the_studies_plays_no_part() -> None:
    time, event, risk = draw(3)
    order = np.random.default_rng(0).permutation(len(time))
    assert survival.concordance_index(time[order], event[order], risk[order]) == survival.concordance_index(time, event, risk)


def test_a_hundred_thousand_studies_are_no_matter_of_minutes() -> None:
    """All pairs would be ten thousand million."""
    generator = np.random.default_rng(0)
    risk = generator.normal(size=100_000)
    began = clock.perf_counter()
    found = survival.concordance_index(generator.exponential(np.exp(-risk)), generator.random(100_000) < 0.5, risk)
    assert clock.perf_counter() - began < 20
    assert 0.7 < found < 0.8


@pytest.mark.parametrize("seed", range(4))
def test_censoring_by_hand(seed: int) -> None:
    time, event, _ = draw(seed)
    found = Censoring.of(time, event)
    asked = np.concatenate([[0.5], np.unique(time), np.unique(time)[:-1] + 0.5])
    assert found.at(asked) == pytest.approx([censoring_by_hand(time, event, at) for at in asked])


def test_past_the_last_time_censoring_is_not_known_unless_none_is_left() -> None:
    time = np.array([1.0, 2.0, 3.0])
    some_left = Censoring.of(time, np.array([True, False, True]))
    none_left = Censoring.of(time, np.array([True, True, False]))
    assert some_left.at(np.array([3.0])) == pytest.approx([0.5])
    assert np.isnan(some_left.at(np.array([3.1]))).all()
    assert none_left.at(np.array([3.0, 3.1])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tau", [7.0, np.inf])
def test_uno_by_pairs(seed: int, tau: float) -> None:
    time, event, risk = draw(seed)
    train_time, train_event, _ = draw(seed + 100, n=200, levels=14)
    weight = np.array(
        [
            censoring_by_hand(train_time, train_event, t) ** -2 if died and t < tau else 0.0
            for t, died in zip(time, event, strict=True)
        ]
    )
    found = survival.concordance_index_ipcw(time, event, risk, Censoring.of(train_time, train_event), tau=tau)
    assert found == pytest.approx(by_pairs(time, event, risk, weight), abs=1e-12)


def test_uno_without_censoring_is_harrell() -> None:
    time, _, risk = draw(1)
    everyone = np.ones(len(time), dtype=bool)
    found = survival.concordance_index_ipcw(time, everyone, risk, Censoring.of(time, everyone))
    assert found == survival.concordance_index(time, everyone, risk)


def test_uno_is_not_defined_where_nobody_is_left_uncensored() -> None:
    censoring = Censoring.of(np.array([1.0, 2.0, 3.0]), np.array([True, True, False]))
    time, event, risk = np.array([1.0, 4.0, 5.0]), np.ones(3, dtype=bool), np.array([3.0, 2.0, 1.0])
    assert np.isnan(survival.concordance_index_ipcw(time, event, risk, censoring))
    assert survival.concordance_index_ipcw(time, event, risk, censoring, tau=4.0) == 1.0


def test_uno_does_not_move_with_the_censoring_and_harrell_does() -> None:
    """Early events are ranked well and late ones are not; with heavy censoring Harrell's C sees the early ones alone."""
    generator = np.random.default_rng(5)
    n = 20_000
    died_at = generator.exponential(1.0, n)
    risk = np.where(died_at < 0.5, -died_at, generator.normal(size=n) * 0.1 - 0.5)
    censored_at = generator.exponential(0.7, n)
    time, event = np.minimum(died_at, censored_at), died_at <= censored_at
    tau = 1.5
    whole = survival.concordance_index_ipcw(died_at, np.ones(n, bool), risk, Censoring.of(died_at, np.ones(n, bool)), tau=tau)
    uno = survival.concordance_index_ipcw(time, event, risk, Censoring.of(time, event), tau=tau)
    assert uno == pytest.approx(whole, abs=0.01)
    assert abs(survival.concordance_index(time, event, risk) - whole) > 0.03


@pytest.mark.parametrize("seed", range(4))
def test_brier_score_study_by_study(seed: int) -> None:
    time, event, _ = draw(seed)
    train_time, train_event, _ = draw(seed + 100, n=200, levels=14)
    times = np.array([2.0, 4.5, 8.0])
    probability = np.random.default_rng(seed).random((60, 3))
    expected = np.zeros(3)
    for i, (t, died) in enumerate(zip(time, event, strict=True)):
        for j, at in enumerate(times):
            if died and t <= at:
                expected[j] += probability[i, j] ** 2 / censoring_by_hand(train_time, train_event, t) / 60
            elif t > at:
                expected[j] += (1 - probability[i, j]) ** 2 / censoring_by_hand(train_time, train_event, at) / 60
    censoring = Censoring.of(train_time, train_event)
    assert survival.brier_score(time, event, probability, times, censoring) == pytest.approx(expected, abs=1e-12)
    whole = survival.integrated_brier_score(time, event, probability, times, censoring)
    assert whole == pytest.approx(((expected[0] + expected[1]) / 2 * 2.5 + (expected[1] + expected[2]) / 2 * 3.5) / 6)


def test_a_guess_of_one_half_has_a_brier_score_of_a_quarter_at_any_time() -> None:
    time = np.arange(1.0, 21.0)
    everyone = np.ones(20, dtype=bool)
    times = np.array([3.0, 7.0, 19.0])
    half = np.full((20, 3), 0.5)
    assert survival.integrated_brier_score(time, everyone, half, times, Censoring.of(time, everyone)) == pytest.approx(0.25)
    assert np.isnan(survival.integrated_brier_score(time, everyone, half[:, :1], times[:1], Censoring.of(time, everyone)))


def test_the_brier_score_does_not_move_with_the_censoring() -> None:
    generator = np.random.default_rng(6)
    n, times = 40_000, np.array([0.3, 0.8, 1.4])
    died_at = generator.exponential(1.0, n)
    censored_at = generator.exponential(1.5, n)
    probability = np.clip(np.exp(-times) + generator.normal(0, 0.1, (n, 1)), 0, 1)
    time, event, everyone = np.minimum(died_at, censored_at), died_at <= censored_at, np.ones(n, dtype=bool)
    whole = survival.brier_score(died_at, everyone, probability, times, Censoring.of(died_at, everyone))
    weighted = survival.brier_score(time, event, probability, times, Censoring.of(time, event))
    assert weighted == pytest.approx(whole, abs=0.01)
    unweighted = survival.brier_score(time, event, probability, times, Censoring.of(died_at, everyone))
    assert abs(unweighted - whole).max() > 0.05


def test_the_true_survival_function_has_the_lowest_integrated_brier_score() -> None:
    generator = np.random.default_rng(7)
    n, times = 5_000, np.linspace(0.1, 1.5, 15)
    rate = np.exp(generator.normal(0, 0.8, n))
    died_at, censored_at = generator.exponential(1 / rate), generator.exponential(2.0, n)
    time, event = np.minimum(died_at, censored_at), died_at <= censored_at
    censoring = Censoring.of(time, event)

    def score(power: float) -> float:
        return survival.integrated_brier_score(time, event, np.exp(-(rate**power)[:, None] * times), times, censoring)

    assert score(1.0) < min(score(0.0), score(0.5), score(2.0))
