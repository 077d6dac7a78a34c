"""Metrics against closed forms worked out by hand to 1e-6."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from draf_dist.metrics import calibration, classification, selective
from draf_dist.metrics.paired import paired_t

ALARM = np.array([0.95, 0.91, 0.83, 0.77, 0.72, 0.66, 0.61, 0.56, 0.53, 0.51])
TEN = np.stack([1 - ALARM, ALARM], axis=1)
TEN_LABEL = np.array([1, 1, 1, 0, 1, 0, 1, 0, 1, 0])
FOUR = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.4, 0.35, 0.25], [0.2, 0.2, 0.6]])
FOUR_LABEL = np.array([0, 1, 1, 2])


@pytest.mark.parametrize(("num_bins", "ece", "mce"), [(5, 0.167, 0.200), (10, 0.167, 0.245), (15, 0.223, 0.770)])
def test_calibration_error_depends_on_the_bins_as_worked_out(num_bins: int, ece: float, mce: float) -> None:
    bins = calibration.equal_width_bins(*calibration.top_label(TEN, TEN_LABEL), num_bins)
    assert calibration.expected_calibration_error(bins) == pytest.approx(ece, abs=1e-6)
    assert calibration.maximum_calibration_error(bins) == pytest.approx(mce, abs=1e-6)


def test_equal_mass_calibration_error() -> None:
    bins = calibration.equal_mass_bins(*calibration.top_label(TEN, TEN_LABEL), 5)
    assert bins.count.tolist() == [2] * 5
    assert calibration.expected_calibration_error(bins) == pytest.approx(0.133, abs=1e-6)


def test_proper_scores_of_the_ten() -> None:
    assert calibration.brier_binary(TEN, TEN_LABEL) == pytest.approx(0.20931, abs=1e-6)
    assert calibration.brier(TEN, TEN_LABEL) == pytest.approx(2 * 0.20931, abs=1e-6)
    assert calibration.negative_log_likelihood(TEN, TEN_LABEL) == pytest.approx(0.5872428, abs=1e-6)


def test_ranking_metrics_of_the_ten() -> None:
    assert classification.auroc(TEN, TEN_LABEL) == pytest.approx(0.75, abs=1e-6)
    assert classification.auprc(TEN, TEN_LABEL) == pytest.approx(0.8634921, abs=1e-6)
    assert classification.f1(TEN, TEN_LABEL) == pytest.approx(0.75, abs=1e-6)
    assert classification.accuracy(TEN, TEN_LABEL) == pytest.approx(0.6, abs=1e-6)


def test_selective_risks_of_the_ten() -> None:
    confidence, hit = calibration.top_label(TEN, TEN_LABEL)
    _, risk = selective.risk_coverage(confidence, ~hit)
    assert risk == pytest.approx([0, 0, 0, 0.25, 0.2, 1 / 3, 2 / 7, 0.375, 1 / 3, 0.4], abs=1e-6)
    assert selective.aurc(confidence, ~hit) == pytest.approx(0.2177381, abs=1e-6)
    assert selective.aurc(-(~hit).astype(float), ~hit) == pytest.approx(0.1126190, abs=1e-6)
    assert selective.excess_aurc(confidence, ~hit) == pytest.approx(0.1051190, abs=1e-6)


def test_three_classes() -> None:
    assert classification.accuracy(FOUR, FOUR_LABEL) == pytest.approx(0.75, abs=1e-6)
    assert calibration.brier(FOUR, FOUR_LABEL) == pytest.approx(0.32125, abs=1e-6)
    assert calibration.negative_log_likelihood(FOUR, FOUR_LABEL) == pytest.approx(0.6070371, abs=1e-6)
    bins = calibration.equal_width_bins(*calibration.top_label(FOUR, FOUR_LABEL), 10)
    assert calibration.expected_calibration_error(bins) == pytest.approx(0.375, abs=1e-6)


def test_paired_t_of_five_seeds() -> None:
    """O16."""
    a, b = np.array([0.81, 0.80, 0.82, 0.79, 0.83]), np.array([0.80, 0.785, 0.81, 0.785, 0.81])
    found = paired_t(a, b)
    assert found.t == pytest.approx(4.7067872, abs=1e-6)
    assert found.p == pytest.approx(0.0092617, abs=1e-6)
    assert found.degrees == 4
    assert found.mean == pytest.approx(0.012)
    theirs = ttest_rel(a, b)
    assert (found.t, found.p) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-9)
    other = paired_t(b, a)
    assert (other.t, other.p, other.low, other.high) == pytest.approx((-found.t, found.p, -found.high, -found.low))


def test_a_paired_t_needs_pairs_and_a_spread() -> None:
    same = paired_t(np.array([0.5, 0.75]), np.array([0.25, 0.5]))
    assert (same.mean, same.low, same.high) == (0.25, 0.25, 0.25)
    assert np.isnan(same.p)
    for a, b in ((np.ones(1), np.zeros(1)), (np.ones(3), np.zeros(2))):
        with pytest.raises(ValueError, match="two or more pairs"):
            paired_t(a, b)
