"""Regret is zero for the exact posterior itself, positive for anything else, and follows what is present."""

import numpy as np
import pytest
from hand_made_predictions import Truth, context, studies

from draf_dist.errors import DataError
from draf_dist.evaluation.describe import describe_regret
from draf_dist.evaluation.regret import pointwise_divergence, pointwise_regret, posterior


def test_the_posterior_itself_loses_nothing() -> None:
    predictions, truth = studies()
    exact = posterior(predictions, truth)
    assert exact == pytest.approx(predictions.probability.astype(np.float64), abs=1e-6)
    assert pointwise_divergence(exact, exact) == pytest.approx(np.zeros(120), abs=1e-15)
    assert pointwise_regret(exact, exact, predictions.target) == pytest.approx(np.zeros(120), abs=1e-15)


@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_any_other_model_loses(sharpness: float) -> None:
    predictions, truth = studies(sharpness=sharpness)
    made = context(truth)
    regret = describe_regret(predictions, made, made.resamples(predictions))
    assert regret is not None
    assert regret.expected.value > 0.01
    assert regret.expected.low > 0


def test_the_expected_regret_is_the_mean_over_labels_of_the_observed_one() -> None:
    exact, model = np.array([[0.3, 0.7]]), np.array([[0.6, 0.4]])
    by_label = [pointwise_regret(exact, model, np.array([k]))[0] for k in (0, 1)]
    assert 0.3 * by_label[0] + 0.7 * by_label[1] == pytest.approx(pointwise_divergence(exact, model)[0])


def test_an_absent_modality_has_no_say_in_the_posterior() -> None:
    predictions, _ = studies(2)
    truth = {int(uid): Truth(0.0, {"cxr": 2.0, "labs": -1.0}) for uid in predictions.uid}
    present = np.array([[True, False], [False, True]])
    one = type(predictions)(**{**vars(predictions), "present": present})
    assert posterior(one, truth)[:, 1] == pytest.approx([1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(1.0))])


def test_truth_of_other_studies_is_refused() -> None:
    predictions, truth = studies()
    truth.pop(int(predictions.uid[0]))
    with pytest.raises(DataError, match="1 of 120 studies"):
        posterior(predictions, truth)
