"""Regret against a planted truth: the nats that a model loses to the exact posterior of the very same inputs.

Where the data were synthesised, the log-likelihood ratio of every modality is known, and modalities are independent given the
label, so the posterior of any subset is sigmoid(prior + sum of llr present): of a study as it is, and with modalities removed.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from scipy.special import expit

from draf_dist.errors import DataError, explain
from draf_dist.evaluation.predictions import Predictions
from draf_dist.metrics.calibration import SMALLEST_PROBABILITY, pointwise_negative_log_likelihood
from draf_dist.metrics.classification import Floats, Integers


class PlantedTruth(Protocol):
    """What is known of one synthetic study: prior log odds of class 1, and per modality the log-likelihood ratio, in nats."""

    @property
    def prior_logit(self) -> float:
        """Log odds of class 1 before anything is seen."""
        ...

    @property
    def llr(self) -> Mapping[str, float]:
        """Modality -> ln p(x_m | 1) / p(x_m | 0), given the known state of corruption; absent modalities count 0."""
        ...


def posterior(predictions: Predictions, truth: Mapping[int, PlantedTruth]) -> Floats:
    """The exact p(y | the modalities present in these predictions), (n, 2).

    Raises:
        DataError: the label has more than two classes, or the truth is of other studies.
    """
    if len(predictions.classes) != 2 or predictions.answers is not None:
        found = str(len(predictions.classes)) if predictions.answers is None else "several labels, or times"
        raise DataError(explain("planted truth", expected="a label of two classes", found=found, remedy="Leave it out."))
    unknown = sum(int(uid) not in truth for uid in predictions.uid)
    if unknown:
        found = f"{unknown} of {predictions.num_studies} studies without truth"
        raise DataError(
            explain("planted truth", expected="every study", found=found, remedy="Give the truth of this very release.")
        )
    rows = [truth[int(uid)] for uid in predictions.uid]
    prior = np.array([row.prior_logit for row in rows])
    llr = np.array([[row.llr[name] for name in predictions.modalities] for row in rows])
    p = expit(prior + np.where(predictions.present, llr, 0.0).sum(axis=1))
    return np.stack([1 - p, p], axis=1)


def pointwise_regret(truth: Floats, model: Floats, label: Integers) -> Floats:
    """The difference ln posterior(y) - ln p(y) at the label seen, in nats, (n,).

    Its mean is what the model's NLL is above the best possible one. Single studies can be negative by luck of the label; in
    expectation over labels drawn from the posterior it is `pointwise_divergence`.
    """
    return pointwise_negative_log_likelihood(model, label) - pointwise_negative_log_likelihood(truth, label)


def pointwise_divergence(truth: Floats, model: Floats) -> Floats:
    """KL(posterior || model) in nats, (n,): the regret in expectation over the label, never negative, far less noisy."""
    safe_truth = np.maximum(truth, SMALLEST_PROBABILITY)
    ratio = np.log(safe_truth) - np.log(np.maximum(model, SMALLEST_PROBABILITY))
    return np.asarray(np.sum(truth * ratio, axis=1), dtype=np.float64)
