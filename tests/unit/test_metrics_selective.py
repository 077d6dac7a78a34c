"""Abstention: ties, best order, and what happens to the rare class."""

import numpy as np
import pytest

from draf_dist.metrics import selective


def test_equal_confidence_spreads_errors_evenly_whatever_the_order() -> None:
    confidence = np.full(4, 0.7)
    for error in ([1, 0, 0, 0], [0, 0, 0, 1]):
        coverage, risk = selective.risk_coverage(confidence, np.array(error, dtype=bool))
        assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
        assert risk == pytest.approx([0.25] * 4)
    assert selective.aurc(confidence, np.array([1, 0, 0, 0], dtype=bool)) == pytest.approx(0.25)


def test_tied_aurc_is_the_mean_over_all_orders_of_the_tie() -> None:
    generator = np.random.default_rng(0)
    confidence = np.array([0.9, 0.8, 0.8, 0.8, 0.8, 0.5])
    error = np.array([0, 1, 0, 0, 1, 1], dtype=bool)
    broken = [selective.aurc(confidence + generator.uniform(0, 1e-6, 6), error) for _ in range(4000)]
    assert selective.aurc(confidence, error) == pytest.approx(np.mean(broken), abs=5e-3)


def test_the_best_order_has_no_excess() -> None:
    error = np.array([1, 0, 1, 0, 0], dtype=bool)
    assert selective.excess_aurc(1.0 - error, error) == pytest.approx(0.0)
    assert selective.excess_aurc(error.astype(float), error) > 0.3


def test_coverage_at_risk_never_cuts_through_a_tie() -> None:
    confidence = np.array([0.9, 0.6, 0.6, 0.6])
    error = np.array([0, 0, 0, 1], dtype=bool)
    assert selective.coverage_at_risk(confidence, error, risk=0.2) == 0.25
    assert selective.coverage_at_risk(confidence, error, risk=0.25) == 1.0
    assert selective.coverage_at_risk(confidence, np.ones(4, dtype=bool), risk=0.1) == 0.0


def test_abstaining_by_the_top_probability_loses_the_rare_class() -> None:
    common = np.linspace(0.02, 0.2, 18)
    rare = np.array([0.45, 0.6])
    p = np.concatenate([common, rare])
    probability, label = np.stack([1 - p, p], axis=1), np.repeat([0, 1], [18, 2])
    _, risk = selective.risk_coverage(probability.max(axis=1), (p >= 0.5) != (label == 1))
    assert risk[17] == 0.0
    curve = selective.class_curve(probability, label, 1)
    assert curve.kept[17] == 0.0
    assert np.isnan(curve.risk[17])
    assert curve.kept[-1] == 1.0
    assert curve.risk[-1] == 0.5


def test_recall_counts_abstained_positives_as_missed() -> None:
    p = np.array([0.95, 0.1, 0.7, 0.6])
    label = np.array([1, 0, 1, 0])
    curve = selective.alarm_curve(np.stack([1 - p, p], axis=1), label, threshold=0.5)
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.recall == pytest.approx([0.5, 0.5, 1.0, 1.0])
    assert curve.ppv == pytest.approx([1.0, 1.0, 1.0, 2 / 3])
