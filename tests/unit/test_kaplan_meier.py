"""Kaplan and Meier by hand, and calibration against it, which must not be fooled by censoring."""

import numpy as np
import pytest

from draf_dist.metrics.kaplan_meier import KaplanMeier, event_bins

TIME = np.array([1.0, 2.0, 2.0, 3.0, 5.0])
EVENT = np.array([True, True, False, True, False])


def test_survival_is_the_product_over_those_at_risk() -> None:
    seen = KaplanMeier.of(TIME, EVENT)
    # 4/5 at 1, times 3/4 at 2 (whoever is censored there was at risk), times 1/2 at 3.
    assert seen.at(np.array([0.5, 1.0, 1.9, 2.0, 3.0, 5.0])) == pytest.approx([1, 0.8, 0.8, 0.6, 0.3, 0.3])
    assert np.isnan(seen.at(np.array([5.1]))).all()


def test_after_the_last_event_nobody_is_left() -> None:
    seen = KaplanMeier.of(np.array([1.0, 2.0]), np.array([True, True]))
    assert seen.at(np.array([1.0, 2.0, 9.0])) == pytest.approx([0.5, 0.0, 0.0])


def test_greenwood_by_hand() -> None:
    seen = KaplanMeier.of(TIME, EVENT)
    assert seen.variance == pytest.approx([1 / 20, 1 / 20 + 1 / 12, 1 / 20 + 1 / 12 + 1 / 2, 1 / 20 + 1 / 12 + 1 / 2])
    low, high = seen.interval(np.array([2.0]))
    spread = 1.959964 * np.sqrt(1 / 20 + 1 / 12) / -np.log(0.6)
    assert (low[0], high[0]) == pytest.approx((0.6 ** np.exp(spread), 0.6 ** np.exp(-spread)), rel=1e-6)
    assert np.isnan(seen.interval(np.array([0.5]))).all()


def test_the_interval_covers_the_truth_in_19_of_20() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        death, leaves = generator.exponential(1.0, 120), generator.exponential(2.0, 120)
        low, high = KaplanMeier.of(np.minimum(death, leaves), death < leaves).interval(np.array([0.8]))
        inside += int(low[0] <= np.exp(-0.8) <= high[0])
    assert 0.92 < inside / 400 < 0.98


def test_the_truth_is_calibrated_at_an_edge_although_half_are_censored() -> None:
    generator = np.random.default_rng(1)
    rate = np.exp(generator.normal(0, 1, 40_000))
    death, leaves = generator.exponential(1 / rate), generator.exponential(1.0, 40_000)
    time, event = np.minimum(death, leaves), death < leaves
    truth = 1 - np.exp(-rate * 0.7)
    bins = event_bins(time, event, truth, at=0.7, num_bins=10)
    assert bins.calibration_error < 0.012
    assert bins.count.sum() == 40_000
    # The share of events among all, censored ones for survivors, is another number and would look miscalibrated.
    assert abs(np.mean(event & (time <= 0.7)) - truth.mean()) > 0.05
    assert event_bins(time, event, truth**2, at=0.7, num_bins=10).calibration_error > 0.1


def test_a_bin_of_which_nobody_was_seen_for_so_long_is_not_known() -> None:
    time, event = np.array([1.0, 1.0, 9.0, 9.0]), np.zeros(4, dtype=np.bool_)
    bins = event_bins(time, event, np.array([0.1, 0.2, 0.3, 0.4]), at=5.0, num_bins=2)
    assert np.isnan(bins.observed).tolist() == [True, False]
    assert bins.calibration_error == pytest.approx(0.35)
