"""Temperature scaling recovers a planted temperature, keeps the ranking and never worsens validation."""

import numpy as np
import pytest

from draf_dist.metrics.calibration import negative_log_likelihood
from draf_dist.metrics.temperature import HIGHEST, LOWEST, fit_temperature, scale


def sharpened(temperature: float, num_classes: int, n: int = 20000) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    true = generator.dirichlet(np.ones(num_classes), n)
    label = (generator.random((n, 1)) > true.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return scale(true, 1 / temperature), label


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("planted", [0.5, 1.0, 3.0])
def test_a_planted_temperature_is_found(planted: float, num_classes: int) -> None:
    probability, label = sharpened(planted, num_classes)
    assert fit_temperature(probability, label).value == pytest.approx(planted, rel=0.05)


def test_temperature_one_changes_nothing() -> None:
    probability = np.random.default_rng(1).dirichlet(np.ones(3), 50)
    assert scale(probability, 1.0) == pytest.approx(probability, abs=1e-12)


def test_scaling_lowers_validation_nll_to_a_minimum() -> None:
    probability, label = sharpened(2.0, 2, n=500)
    best = fit_temperature(probability, label).value
    at_best = negative_log_likelihood(scale(probability, best), label)
    assert at_best <= negative_log_likelihood(probability, label)
    for other in (best * 0.99, best * 1.01):
        assert at_best <= negative_log_likelihood(scale(probability, other), label)


def test_scaling_keeps_the_order_of_the_studies() -> None:
    p = np.random.default_rng(2).uniform(size=100)
    scaled = scale(np.stack([1 - p, p], axis=1), 2.5)[:, 1]
    assert (np.argsort(p) == np.argsort(scaled)).all()


def test_what_cannot_be_fitted_says_so() -> None:
    p = np.array([0.2, 0.8, 0.9])
    probability = np.stack([1 - p, p], axis=1)
    assert fit_temperature(probability, np.array([1, 1, 1])).value == 1.0
    assert fit_temperature(probability, np.array([1, 1, 1])).note
    separated = fit_temperature(probability, np.array([0, 1, 1]))
    assert separated.value == LOWEST
    assert separated.note
    reversed_labels = fit_temperature(probability, np.array([1, 0, 0]))
    assert reversed_labels.value == HIGHEST
    assert reversed_labels.note
