"""What a reliability could gain at most (benchmarks/planted_ceiling.py): closed forms of the readers."""

import numpy as np
import planted_ceiling as ceiling
import pytest
import torch
from scipy.special import log_expit

from draf_dist.sources.synth.population import Population, draw_population


@pytest.fixture(scope="module")
def population() -> Population:
    torch.set_num_threads(1)
    return draw_population(4, 8_000, 3)


def nll(logit: ceiling.Floats, y: np.ndarray) -> float:
    return float(-log_expit(np.where(y == 1, logit, -logit)).mean())


def test_on_a_clean_image_the_best_weight_is_one_over_one_plus_the_variance_of_the_noise(population: Population) -> None:
    """Its three components are uncorrelated and of unit variance, so C = (1 + sigma^2) I only scales the ratio."""
    clean = population.severity[population.present[:, 0], 0] == 0
    for sigma in (0.4, 1.6, 10.0):
        readers = ceiling.under_noise(population, "cxr", sigma)
        ratio = (readers.weighted - readers.rejecting) / (readers.trusting - readers.rejecting)
        assert ratio[clean] == pytest.approx(1 / (1 + sigma**2), rel=1e-9)


def test_without_noise_everyone_who_reads_agrees(population: Population) -> None:
    readers = ceiling.under_noise(population, "labs", 0.0)
    assert readers.weighted == pytest.approx(readers.clean, abs=1e-9)
    assert readers.trusting == pytest.approx(readers.clean, abs=1e-9)
    assert ceiling.best_weight(readers) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", ceiling.NOISY)
def test_nobody_beats_the_posterior_of_what_is_left(population: Population, name: str) -> None:
    for sigma in ceiling.SIGMAS:
        readers = ceiling.under_noise(population, name, sigma)
        assert nll(readers.weighted, readers.y) <= min(nll(readers.trusting, readers.y), nll(readers.rejecting, readers.y)) + 0.003


def test_rejecting_costs_where_noise_is_mild_and_pays_where_it_is_not(population: Population) -> None:
    mild, wild = (ceiling.under_noise(population, "cxr", sigma) for sigma in (0.4, 10.0))
    worth = [
        ceiling.divergence(one.weighted, one.trusting).mean() - ceiling.divergence(one.weighted, one.rejecting).mean()
        for one in (mild, wild)
    ]
    assert worth[0] < -0.05
    assert worth[1] > 0.5


def test_bits_say_nothing_where_absence_says_nothing_and_the_truth_where_it_does(population: Population) -> None:
    at_random = ceiling.missing_not_at_random(population, 0.3, slope=0.0)
    assert at_random.with_bits == pytest.approx(at_random.without_bits, abs=1e-9)
    by_label = ceiling.missing_not_at_random(population, 0.3)
    assert nll(by_label.with_bits, by_label.y) < nll(by_label.without_bits, by_label.y) - 0.05


def test_the_divergence_is_the_loss_above_the_posteriors_own(population: Population) -> None:
    """E[NLL(reader) - NLL(posterior)] over labels: within sampling error of the mean KL."""
    readers = ceiling.under_noise(population, "vitals", 1.6)
    expected = ceiling.divergence(readers.weighted, readers.rejecting).mean()
    assert nll(readers.rejecting, readers.y) - nll(readers.weighted, readers.y) == pytest.approx(expected, abs=0.005)
    assert (ceiling.divergence(readers.weighted, readers.rejecting) >= -1e-12).all()
