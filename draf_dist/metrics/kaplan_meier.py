"""What became of studies, without a model: Kaplan and Meier's survival, and predictions of survival held against it."""

from dataclasses import dataclass

import numpy as np

from draf_dist.metrics.classification import Flags, Floats, Integers

# 97.5 % of the normal distribution.
_Z = 1.959963984540054


@dataclass(frozen=True)
class KaplanMeier:
    """S(t) = prod over u <= t of (1 - d_u / n_u), with d_u events at u and n_u at risk, and Greenwood's variance of ln S.

    time (T,), rising; survival, variance (T,), there and until the next time.
    """

    time: Floats
    survival: Floats
    variance: Floats

    @classmethod
    def of(cls, time: Floats, event: Flags) -> "KaplanMeier":
        """From times (n,) of an event, or until which there was none; events (n,) come before what is censored at the same time."""
        unique, place = np.unique(time, return_inverse=True)
        everyone = np.bincount(place, minlength=len(unique))
        events = np.bincount(place[event], minlength=len(unique))
        at_risk = everyone[::-1].cumsum()[::-1]
        left = at_risk - events
        # Where all at risk have their event S is 0, and so is whatever its variance.
        terms = np.divide(events, at_risk * left, out=np.zeros(len(unique)), where=left > 0)
        return cls(unique.astype(np.float64), np.cumprod(1 - events / np.maximum(at_risk, 1)), np.cumsum(terms))

    def at(self, times: Floats) -> Floats:
        """S(t) at times (J,), 1 before the first; past the last it is not known, NaN, unless it is 0 there. (J,)."""
        found = np.concatenate([[1.0], self.survival])[np.searchsorted(self.time, times, side="right")]
        return np.where(self._is_known(times), found, np.nan)

    def interval(self, times: Floats) -> tuple[Floats, Floats]:
        """The 95 % interval S^exp(-+ z sd(ln -ln S)) at times (J,), (J,) each; NaN where S is 0, 1 or not known."""
        survival = self.at(times)
        variance = np.concatenate([[0.0], self.variance])[np.searchsorted(self.time, times, side="right")]
        inside = (survival > 0) & (survival < 1)
        log = np.log(np.where(inside, survival, 0.5))
        wide = np.exp(_Z * np.sqrt(variance) / -log)
        return tuple(np.where(inside, np.exp(log * each), np.nan) for each in (wide, 1 / wide))  # type: ignore[return-value]

    def _is_known(self, times: Floats) -> Flags:
        last = self.time[-1] if len(self.time) else -np.inf
        ended = len(self.survival) > 0 and self.survival[-1] == 0
        return np.asarray((times <= last) | ended, dtype=np.bool_)


@dataclass(frozen=True)
class EventBins:
    """Bins of equal mass by the predicted probability of an event before a time, (b,) each.

    low, high: ends of what is predicted in the bin. predicted: its mean. observed: 1 - S by Kaplan and Meier, NaN where nobody in
    the bin was seen for so long.
    """

    low: Floats
    high: Floats
    count: Integers
    predicted: Floats
    observed: Floats

    @property
    def calibration_error(self) -> float:
        """Sum over bins of n_b / n * |predicted_b - observed_b| over the bins where it is known; NaN if there is none."""
        known = ~np.isnan(self.observed)
        total = int(self.count[known].sum())
        gap = np.abs(self.predicted - self.observed)[known]
        return float(np.sum(self.count[known] * gap) / total) if total else float("nan")


def event_bins(time: Floats, event: Flags, predicted: Floats, *, at: float, num_bins: int) -> EventBins:
    """Predicted probabilities (n,) of an event up to a time, in bins that hold the same number of studies, to one."""
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, num_bins) if len(part)]
    until = np.array([at])
    observed = [1 - float(KaplanMeier.of(time[part], event[part]).at(until)[0]) for part in parts]
    return EventBins(
        low=np.array([predicted[part[0]] for part in parts]),
        high=np.array([predicted[part[-1]] for part in parts]),
        count=np.array([len(part) for part in parts], dtype=np.int64),
        predicted=np.array([predicted[part].mean() for part in parts]),
        observed=np.array(observed),
    )
