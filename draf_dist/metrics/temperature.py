"""Temperature scaling: one number, fitted on validation, that makes probabilities as sure as they deserve."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from draf_dist.metrics.calibration import SMALLEST_PROBABILITY, negative_log_likelihood
from draf_dist.metrics.classification import Flags, Floats, Integers
from draf_dist.schema.record import Record

LOWEST, HIGHEST = 0.05, 20.0


class Temperature(Record):
    """The fitted temperature, and the NLL of validation (nats) with T = 1 and with it.

    `note` says where it could not be fitted (then it is 1) or stopped at the end of its range.
    """

    value: float
    nll_raw: float | None
    nll_scaled: float | None
    note: str = ""


def scale(probability: Floats, temperature: float) -> Floats:
    """softmax(ln p / T) of the mean predictive probability p, (n, K) -> (n, K).

    The temperature acts on the mean over Monte-Carlo passes, not on the logits of every pass: so the stored predictions are all
    that is needed, T = 1 changes nothing, and the order of the classes within a study never changes.
    """
    scaled = np.log(np.maximum(probability, SMALLEST_PROBABILITY)) / temperature
    weight = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(weight / weight.sum(axis=1, keepdims=True), dtype=np.float64)


def fit_temperature(probability: Floats, label: Integers) -> Temperature:
    """The T in [0.05, 20] that minimises the NLL of scale(probability, T).

    With beta = 1/T and z = ln p the NLL is convex in beta and its derivative is mean(E_beta[z] - z_y), which has at most one
    root: found by bracketing, so the result depends on nothing but the data.
    """
    value, note = _minimum(probability, label)
    nll = [negative_log_likelihood(scale(probability, each), label) if len(label) else None for each in (1.0, value)]
    return Temperature(value=value, nll_raw=nll[0], nll_scaled=nll[1], note=note)


@dataclass(frozen=True)
class Questions:
    """Yes-or-no questions with their answers, q of them about n studies: the NLL of a study is the weighted sum over its own.

    probability (q,): of yes. answer: bool (q,). weight (q,).
    """

    probability: Floats
    answer: Flags
    weight: Floats
    num_studies: int

    @classmethod
    def of_labels(cls, probability: Floats, label: Flags, observed: Flags) -> "Questions":
        """Labels (n, K), the known ones of a study counting the same: its NLL is their mean, as in losses/task.py."""
        weight = 1 / np.maximum(observed.sum(axis=1, keepdims=True), 1) * np.ones(observed.shape)
        return cls(probability[observed], label[observed], weight[observed], len(probability))

    @classmethod
    def of_hazards(cls, hazard: Floats, interval: Integers, event: Flags) -> "Questions":
        """Whether the event is in each interval up to that of the time: hazards (n, K), interval and event (n,).

        The likelihood of a time is the product over j < k of (1 - h_j), times h_k at an event and 1 - h_k where censored.
        """
        number = np.arange(hazard.shape[1])
        asked = number <= interval[:, None]
        answer = (number == interval[:, None]) & event[:, None]
        return cls(hazard[asked], answer[asked], np.ones(int(asked.sum())), len(hazard))

    def nll(self, temperature: float) -> float:
        """Mean over studies, in nats, at a temperature."""
        yes = scale_each(self.probability, temperature)
        right = np.where(self.answer, yes, 1 - yes)
        return float(np.sum(self.weight * -np.log(np.maximum(right, SMALLEST_PROBABILITY)))) / self.num_studies


def scale_each(probability: Floats, temperature: float) -> Floats:
    """sigmoid(logit(p) / T) of probabilities that stand each by itself (labels, hazards), of any shape; else as `scale`."""
    clipped = np.clip(probability, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return np.asarray(expit(logit(clipped) / temperature), dtype=np.float64)


def fit_temperature_of_each(questions: Questions) -> Temperature:
    """The T in [0.05, 20] that minimises the NLL of scale_each(probability, T): one for all labels, or for all intervals.

    Convex in beta = 1 / T as well, with z = logit(p): the derivative is the weighted sum of (sigmoid(beta z) - y) z.
    """
    value, note = _minimum_of_each(questions)
    nll = [questions.nll(each) if questions.num_studies else None for each in (1.0, value)]
    return Temperature(value=value, nll_raw=nll[0], nll_scaled=nll[1], note=note)


def _minimum(probability: Floats, label: Integers) -> tuple[float, str]:
    if len(np.unique(label)) < 2:
        return 1.0, "validation holds fewer than two classes: probabilities are left as they are"
    logits = np.log(np.maximum(probability, SMALLEST_PROBABILITY))
    chosen = np.take_along_axis(logits, label[:, None], axis=1)[:, 0]

    def slope(beta: float) -> float:
        expected = np.sum(scale(probability, 1 / beta) * logits, axis=1)
        return float(np.mean(expected - chosen))

    return _root(slope)


def _minimum_of_each(questions: Questions) -> tuple[float, str]:
    if len(np.unique(questions.answer)) < 2:
        return 1.0, "validation holds one answer to all questions: probabilities are left as they are"
    clipped = np.clip(questions.probability, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    logits, total = logit(clipped), questions.weight.sum()

    def slope(beta: float) -> float:
        return float(np.sum(questions.weight * (expit(beta * logits) - questions.answer) * logits) / total)

    return _root(slope)


def _root(slope: Callable[[float], float]) -> tuple[float, str]:
    """The T at which the derivative by 1 / T, which rises, is 0."""
    if slope(1 / HIGHEST) >= 0:
        return HIGHEST, "at the upper end of its range: the model carries no information on validation"
    if slope(1 / LOWEST) <= 0:
        return LOWEST, "at the lower end of its range: validation is separated without an error"
    # Imported here: every rank of a training imports this file, and would spend most of a second at each start.
    from scipy.optimize import brentq

    return float(1 / brentq(slope, 1 / HIGHEST, 1 / LOWEST, xtol=1e-12)), ""
