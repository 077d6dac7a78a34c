"""Rank correlation against its definition and scipy, and the warning of an uncertainty that is a risk score."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from draf_dist.metrics.rank import FEWEST, correlation_warning, risk_correlation, spearman


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15) = .6.
    assert spearman(np.array([1.0, 20.0, 300.0, 4e9]), np.array([0.2, 0.1, 0.4, 0.3])) == pytest.approx(0.6)
    # A tie shares the ranks 1 and 2: covariance 1.5, variances 1.5 and 2.
    assert spearman(np.array([5.0, 5.0, 7.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_spearman_is_scipy_s_and_depends_on_ranks_alone() -> None:
    generator = np.random.default_rng(0)
    first = generator.integers(0, 20, 200).astype(float)
    second = first + generator.normal(0, 10, 200)
    assert spearman(first, second) == pytest.approx(float(spearmanr(first, second).statistic))
    assert spearman(np.exp(first), second**3) == pytest.approx(spearman(first, second))
    assert spearman(-first, second) == pytest.approx(-spearman(first, second))


def test_spearman_of_pairs_that_are_numbers_or_of_too_few() -> None:
    nan = math.nan
    assert spearman(np.array([1.0, 2.0, nan, 3.0]), np.array([1.0, 2.0, 9.0, 3.0])) == pytest.approx(1.0)
    assert math.isnan(spearman(np.array([1.0, 2.0, nan]), np.array([1.0, 2.0, 3.0])))
    assert math.isnan(spearman(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])))
    assert math.isnan(spearman(np.zeros(0), np.zeros(0)))


def test_variance_of_probabilities_at_low_prevalence_is_a_risk_score_and_is_said_to_be_one() -> None:
    """Findings 1: Var(p) is about [p (1 - p)]^2 Var(logit)."""
    generator = np.random.default_rng(1)
    logits = generator.normal(-3.0, 1.0, 500)[:, None] + generator.normal(0, 0.5, (500, 30))
    probability = 1 / (1 + np.exp(-logits))
    risk, uncertainty = probability.mean(1), probability.var(1)
    message = correlation_warning("ecg", risk_correlation(uncertainty, risk))
    assert message is not None
    assert message.startswith("Modality ecg: its uncertainty goes with its risk (Spearman +0.9")
    assert "silences the modality that raises the alarm" in message
    # The variance of the logits does not know the risk.
    assert correlation_warning("ecg", risk_correlation(logits.var(1), risk)) is None
    falling = correlation_warning("ecg", risk_correlation(-uncertainty, risk))
    assert falling is not None
    assert "where it sees no risk" in falling


def test_the_limit_itself_and_undefined_correlations_are_no_warning() -> None:
    first, second = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 4.0, 3.0])
    exact = spearman(first, second)
    assert correlation_warning("m", exact, largest=exact) is None
    assert correlation_warning("m", exact, largest=exact - 1e-9) is not None
    assert correlation_warning("m", spearman(np.ones(4), second)) is None


def test_of_a_few_studies_nothing_is_said_of_the_risk() -> None:
    score = np.arange(30.0)
    assert risk_correlation(np.where(score < FEWEST, score, math.nan), score) == 1.0
    assert math.isnan(risk_correlation(np.where(score < FEWEST - 1, score, math.nan), score))
