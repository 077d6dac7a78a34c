"""One temperature for labels and hazards: a planted one is found, the ranking stays, the NLL is that of the metrics."""

import numpy as np
import pytest
from scipy.special import expit, logit
from task_predictions import of_labels, of_times

from draf_dist.evaluation.scoring import scaled, scores_of, temperature_of
from draf_dist.metrics.survival import survival_negative_log_likelihood
from draf_dist.metrics.temperature import HIGHEST, LOWEST, Questions, fit_temperature_of_each, scale_each


@pytest.mark.parametrize("planted", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("make", [of_labels, of_times])
def test_a_planted_temperature_is_found(make, planted: float) -> None:
    found = temperature_of(make(20_000, sharpness=planted))
    assert found.value == pytest.approx(planted, rel=0.05)
    assert found.nll_scaled <= found.nll_raw


def test_it_is_the_minimum_of_the_nll() -> None:
    validation = of_times(400, sharpness=2.0)
    best = temperature_of(validation)

    def nll(temperature: float) -> float:
        known = scaled(validation, temperature).labelled()
        return survival_negative_log_likelihood(known.probability.astype(np.float64), known.target, known.answers.event)

    assert nll(best.value) == pytest.approx(best.nll_scaled, abs=1e-6)
    assert nll(1.0) == pytest.approx(best.nll_raw, abs=1e-6)
    assert best.nll_scaled < min(nll(best.value * 0.97), nll(best.value * 1.03))


def test_the_nll_of_labels_is_the_mean_over_each_study_s_known_ones() -> None:
    probability, label = np.array([[0.8, 0.3], [0.9, 0.5]]), np.array([[True, False], [True, True]])
    questions = Questions.of_labels(probability, label, np.array([[True, True], [True, False]]))
    by_hand = (-(np.log(0.8) + np.log(0.7)) / 2 - np.log(0.9)) / 2
    assert questions.nll(1.0) == pytest.approx(by_hand)


def test_the_questions_of_a_time_are_those_of_its_likelihood() -> None:
    """An event in interval 2 survives two hazards and meets the third; a time censored there survives all three."""
    hazard = np.array([[0.1, 0.2, 0.3, 0.4]] * 2)
    questions = Questions.of_hazards(hazard, np.array([2, 2]), np.array([True, False]))
    assert questions.nll(1.0) == pytest.approx((-np.log(0.9 * 0.8 * 0.3) - np.log(0.9 * 0.8 * 0.7)) / 2)


def test_scaling_acts_on_each_logit_and_keeps_the_order() -> None:
    probability = np.random.default_rng(0).uniform(size=(50, 3))
    assert scale_each(probability, 1.0) == pytest.approx(probability, abs=1e-12)
    assert scale_each(probability, 2.5) == pytest.approx(expit(logit(probability) / 2.5))
    for column in range(3):
        order = np.argsort(probability[:, column])
        assert (np.argsort(scale_each(probability, 2.5)[:, column]) == order).all()


def test_what_cannot_be_fitted_says_so() -> None:
    probability, observed = np.array([[0.2], [0.8], [0.9]]), np.ones((3, 1), dtype=np.bool_)

    def fitted(*answers: int):
        return fit_temperature_of_each(Questions.of_labels(probability, np.array(answers, dtype=np.bool_)[:, None], observed))

    assert (fitted(1, 1, 1).value, bool(fitted(1, 1, 1).note)) == (1.0, True)
    assert (fitted(0, 1, 1).value, bool(fitted(0, 1, 1).note)) == (LOWEST, True)
    assert (fitted(1, 0, 0).value, bool(fitted(1, 0, 0).note)) == (HIGHEST, True)


def test_scores_at_a_temperature_are_those_of_scaled_predictions() -> None:
    known = of_labels().labelled()
    at, by_hand = scores_of(known, None, 2.0).short(), scores_of(scaled(known, 2.0), None).short()
    assert at == pytest.approx(by_hand, abs=1e-6)
