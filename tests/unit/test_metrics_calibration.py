"""Calibration error: its bins, its floor, and that row order plays no part."""

import numpy as np
import pytest

from draf_dist.metrics import calibration


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    confidence = np.array([0.0, 0.2, 0.2000001, 1.0])
    bins = calibration.equal_width_bins(confidence, np.ones(4, dtype=bool), 5)
    assert bins.low.tolist() == pytest.approx([0.0, 0.2, 0.8])
    assert bins.count.tolist() == [2, 1, 1]


def test_ece_of_calibrated_outcomes_is_about_the_floor() -> None:
    generator = np.random.default_rng(1)
    confidence = generator.uniform(0.5, 1.0, 760)
    mean, high = calibration.ece_floor(confidence, replicates=200, seed=0)
    seen = [
        calibration.expected_calibration_error(calibration.equal_width_bins(confidence, generator.random(760) < confidence))
        for _ in range(200)
    ]
    assert np.mean(seen) == pytest.approx(mean, rel=0.1)
    assert np.mean(np.array(seen) <= high) == pytest.approx(0.95, abs=0.05)


def test_the_floor_falls_with_the_root_of_n() -> None:
    confidence = np.random.default_rng(2).uniform(0.5, 1.0, 6400)
    few, _ = calibration.ece_floor(confidence[:400], replicates=100, seed=0)
    many, _ = calibration.ece_floor(confidence, replicates=100, seed=0)
    assert few / many == pytest.approx(4.0, rel=0.2)


def test_an_overconfident_model_stands_above_the_floor() -> None:
    generator = np.random.default_rng(3)
    confidence = generator.uniform(0.8, 1.0, 500)
    hit = generator.random(500) < confidence - 0.2
    ece = calibration.expected_calibration_error(calibration.equal_width_bins(confidence, hit))
    assert ece == pytest.approx(0.2, abs=0.05)
    assert ece > calibration.ece_floor(confidence, replicates=100, seed=0)[1]


def test_equal_mass_bins_do_not_depend_on_row_order_under_ties() -> None:
    confidence = np.repeat([0.6, 0.7], 7)
    hit = np.array([1, 0, 0, 1, 1, 0, 1] * 2, dtype=bool)
    order = np.random.default_rng(0).permutation(14)
    first = calibration.equal_mass_bins(confidence, hit, 4)
    second = calibration.equal_mass_bins(confidence[order], hit[order], 4)
    assert first.frequency == pytest.approx(second.frequency)


def test_a_sure_and_wrong_prediction_costs_a_finite_number_of_nats() -> None:
    nats = calibration.negative_log_likelihood(np.array([[1.0, 0.0]]), np.array([1]))
    assert nats == pytest.approx(-np.log(1e-12))


def test_top_label_and_class_one_ask_different_questions() -> None:
    probability, label = np.array([[0.8, 0.2]]), np.array([0])
    assert [part.tolist() for part in calibration.top_label(probability, label)] == [[0.8], [True]]
    assert [part.tolist() for part in calibration.class_one(probability, label)] == [[0.2], [False]]
