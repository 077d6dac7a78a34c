"""Temperature scaling: one number, fitted on validation, that makes probabilities as sure as they deserve."""

import numpy as np

from draf_dist.metrics.calibration import SMALLEST_PROBABILITY, negative_log_likelihood
from draf_dist.metrics.classification import Floats, Integers
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


def _minimum(probability: Floats, label: Integers) -> tuple[float, str]:
    if len(np.unique(label)) < 2:
        return 1.0, "validation holds fewer than two classes: probabilities are left as they are"
    logit = np.log(np.maximum(probability, SMALLEST_PROBABILITY))
    chosen = np.take_along_axis(logit, label[:, None], axis=1)[:, 0]

    def slope(beta: float) -> float:
        expected = np.sum(scale(probability, 1 / beta) * logit, axis=1)
        return float(np.mean(expected - chosen))

    if slope(1 / HIGHEST) >= 0:
        return HIGHEST, "at the upper end of its range: the model carries no information on validation"
    if slope(1 / LOWEST) <= 0:
        return LOWEST, "at the lower end of its range: validation is separated without an error"
    # Imported here: every rank of a training imports this file, and would spend most of a second at each start.
    from scipy.optimize import brentq

    return float(1 / brentq(slope, 1 / HIGHEST, 1 / LOWEST, xtol=1e-12)), ""
