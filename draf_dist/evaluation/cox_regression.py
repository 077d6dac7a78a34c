"""Cox's regression with a ridge: what a linear risk makes of the same tables; for tables far wider than there are studies too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import minimize

from draf_dist.config.spec import Spec
from draf_dist.errors import DataError, explain

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class CoxRegressionConfig(Spec):
    """A linear log risk with a ridge; of the penalties that with the least partial likelihood loss on validation.

    modalities: what it sees, all of them where none is named. So one of them alone can be a row of a table.
    """

    kind: Literal["cox_regression"] = "cox_regression"
    modalities: tuple[str, ...] = ()
    penalties: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), min_length=1)

    @property
    def name(self) -> str:
        """The row of a table."""
        return "_".join(("cox", *self.modalities)) if self.modalities else self.kind


@dataclass(frozen=True)
class FollowedUp:
    """n studies: features (n, P), all finite; time (n,) of the event or of the last time seen; event (n,), whether it happened."""

    features: Floats
    time: Floats
    event: Flags


def ridge_cox(train: FollowedUp, penalties: Sequence[float]) -> list[Floats]:
    """For each penalty the coefficients b (P,) that minimise Cox's partial likelihood (1972) with a ridge.

        1 / d sum over events i of [log sum over j with t_j >= t_i of exp(x_j b) - x_i b] + penalty / 2 |b|^2

    with d events, ties as Breslow has them. b lies in the span of the studies, so at most n numbers are looked for, however large
    P is. Penalties are above 0, or b may be infinite.

    Raises:
        DataError: nothing happened to anybody.
    """
    if not train.event.any():
        remedy = "Prepare more data."
        raise DataError(explain("training split", expected="studies with an event", found="none", remedy=remedy))
    order = np.argsort(-train.time, kind="stable")
    left, size, right = np.linalg.svd(train.features[order], full_matrices=False)
    reduced, time, event = left * size, train.time[order], train.event[order]
    found, start = [], np.zeros(reduced.shape[1])
    for penalty in penalties:
        best = minimize(_loss, start, args=(reduced, time, event, penalty), jac=True, method="L-BFGS-B", options=_PRECISE)
        found.append(np.asarray(right.T @ best.x, dtype=np.float64))
        start = best.x
    return found


_PRECISE = {"maxiter": 5000, "ftol": 1e-13, "gtol": 1e-8}


def partial_nll(risk: Floats, time: Floats, event: Flags) -> float:
    """What ridge_cox minimises without the ridge, of log risks (n,), in nats an event; NaN where nothing happened."""
    if not event.any():
        return float("nan")
    order = np.argsort(-time, kind="stable")
    return float((_at_risk(risk[order], time[order]) - risk[order])[event[order]].mean())


def best_penalty(train: FollowedUp, val: FollowedUp, penalties: Sequence[float]) -> tuple[float, Floats]:
    """The penalty of the least partial likelihood loss on validation, the first of equals, and its coefficients (P,)."""
    fitted = ridge_cox(train, penalties)
    losses = [partial_nll(val.features @ each, val.time, val.event) for each in fitted]
    best = 0 if np.isnan(losses).all() else int(np.nanargmin(losses))
    return penalties[best], fitted[best]


def breslow(risk: Floats, time: Floats, event: Flags, edges: Floats) -> Floats:
    """The baseline's cumulative hazard in each interval between edges (K - 1,), (K,), of training studies (n,) (Breslow 1974).

    H(t) is the sum over events i before t of 1 / sum over j with t_j >= t_i of exp(risk_j); the last interval ends with the last
    time seen.
    """
    order = np.argsort(-time, kind="stable")
    time, event = time[order], event[order]
    jumps = np.where(event, np.exp(-_at_risk(risk[order], time)), 0.0)
    # A time at an edge belongs to the interval that begins there.
    found = np.bincount(np.searchsorted(edges, time, side="right"), weights=jumps, minlength=len(edges) + 1)
    return np.asarray(found, dtype=np.float64)


def hazards(risk: Floats, baseline: Floats) -> Floats:
    """The probability of an event in each interval, of whom outlived those before: 1 - exp(-H_k exp(risk)). (n, K)."""
    return np.asarray(-np.expm1(-baseline * np.exp(np.minimum(risk, _LARGEST_RISK))[:, None]), dtype=np.float64)


# Past it a hazard is 1 anyway, and exp is still finite.
_LARGEST_RISK = 50.0


def _loss(weights: Floats, features: Floats, time: Floats, event: Flags, penalty: float) -> tuple[float, Floats]:
    """The loss and its gradient; rows come with falling time."""
    risk = features @ weights
    at_risk = _at_risk(risk, time)
    # A row is at risk in all events of its own time and of earlier ones: of the rows from the first of its time on.
    first = np.searchsorted(-time, -time, side="left")
    shares = np.cumsum(np.where(event, np.exp(-at_risk), 0.0)[::-1])[::-1]
    slope = (np.exp(risk) * shares[first] - event) / event.sum()
    value = float((at_risk - risk)[event].mean()) + penalty / 2 * float(weights @ weights)
    return value, features.T @ slope + penalty * weights


def _at_risk(risk: Floats, time: Floats) -> Floats:
    """Log of the sum of exp(risk) over those at risk at the time of each row, (n,); rows come with falling time."""
    last = np.searchsorted(-time, -time, side="right") - 1
    return np.logaddexp.accumulate(risk)[last]
