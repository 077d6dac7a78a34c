"""How well a time to an event is predicted: order of the risks (C-index), and survival probabilities (Brier), under censoring.

Throughout time (n,) is that of the event or of the last time seen, event (n,) is False where censored, and risk (n,) is larger for
whom the event is expected earlier. Definitions are those of scikit-survival, except that what the data do not define is NaN here,
where it raises or leaves rows out.
"""

from dataclasses import dataclass

import numpy as np

from draf_dist.metrics.calibration import SMALLEST_PROBABILITY
from draf_dist.metrics.classification import Flags, Floats, Integers, mean_or_nan

# Studies whose pairs with all others are held at once.
_BLOCK = 256


def survival_function(hazard: Floats) -> Floats:
    """S_k = prod over j <= k of (1 - h_j): the probability of outliving interval k, from hazards (n, K) in [0, 1]. (n, K)."""
    return np.asarray(np.cumprod(1 - hazard, axis=1), dtype=np.float64)


def risk(hazard: Floats) -> Floats:
    """-sum_k S_k, less the expected number of intervals outlived (HEALNet, spec 4.5). (n,)."""
    return np.asarray(-survival_function(hazard).sum(axis=1), dtype=np.float64)


def survival_at(hazard: Floats, edges: Floats, times: Floats) -> Floats:
    """S(t) at times (J,), between edges (K - 1,) as in SurvivalSpec. (n, J).

    Exact at the edges. Within [e_k, e_(k+1)) the hazard is taken as constant, S(e_k) (1 - h_k)^((t - e_k) / (e_(k+1) - e_k)),
    which is ours. The last interval has no end: NaN at times past the last edge.
    """
    bounds = np.concatenate([[0.0], edges])
    before = np.concatenate([np.ones((len(hazard), 1)), survival_function(hazard)], axis=1)
    interval = np.clip(np.searchsorted(bounds, times, side="right") - 1, 0, len(edges) - 1)
    share = (times - bounds[interval]) / np.diff(bounds)[interval]
    found = before[:, interval] * (1 - hazard[:, interval]) ** np.clip(share, 0, 1)
    return np.asarray(np.where(times <= bounds[-1], found, np.nan), dtype=np.float64)


def survival_negative_log_likelihood(hazard: Floats, interval: Integers, event: Flags) -> float:
    """Mean in nats of -ln [S(k - 1) h_k] at an event in interval k, of -ln S(k) where censored in it; p clipped at 1e-12.

    The likelihood itself: the weight of losses/survival.py plays no part.
    """
    return mean_or_nan(pointwise_survival_negative_log_likelihood(hazard, interval, event))


def pointwise_survival_negative_log_likelihood(hazard: Floats, interval: Integers, event: Flags) -> Floats:
    """The same of every study, (n,)."""
    survival = np.concatenate([np.ones((len(hazard), 1)), survival_function(hazard)], axis=1)
    rows = np.arange(len(hazard))
    likelihood = np.where(event, survival[rows, interval] * hazard[rows, interval], survival[rows, interval + 1])
    return np.asarray(-np.log(np.maximum(likelihood, SMALLEST_PROBABILITY)), dtype=np.float64)


@dataclass(frozen=True)
class Censoring:
    """G, how many are not yet censored, by Kaplan and Meier: rising time (T,), and G there and until the next, (T,)."""

    time: Floats
    probability: Floats

    @classmethod
    def of(cls, time: Floats, event: Flags) -> "Censoring":
        """From times of the training split: G(t) = prod over u <= t of (1 - c_u / (n_u - d_u)).

        c_u are censored at u, d_u have their event then, n_u are at risk. Events come first: who has one at u can't be censored
        then.
        """
        unique, place = np.unique(time, return_inverse=True)
        everyone = np.bincount(place, minlength=len(unique))
        events = np.bincount(place[event], minlength=len(unique))
        at_risk = everyone[::-1].cumsum()[::-1] - events
        # Where all at risk have their event none is left to be censored.
        share = (everyone - events) / np.maximum(at_risk, 1)
        return cls(unique.astype(np.float64), np.asarray(np.cumprod(1 - share), dtype=np.float64))

    def at(self, times: Floats) -> Floats:
        """G(t), 1 before the first time; past the last it is not known, NaN, unless it was 0 there. Of the shape of times."""
        steps = np.concatenate([[1.0], self.probability])
        found = steps[np.searchsorted(self.time, times, side="right")]
        last = self.time[-1] if len(self.time) else -np.inf
        return np.asarray(np.where((times > last) & (steps[-1] > 0), np.nan, found), dtype=np.float64)


def concordance_index(time: Floats, event: Flags, risk: Floats) -> float:
    """Harrell's C: the share of comparable pairs in which the one with the earlier event has the larger risk.

    A pair is comparable if one has an event and the other is known to outlive it: a later time, or censored at the same time.
    Two events at one time are not comparable. Equal risks count one half; equal means equal, to the last bit (scikit-survival:
    to 1e-8). NaN without a comparable pair. In O(n log n).
    """
    return weighted_concordance(time, event, risk, np.ones(len(time)))


def concordance_index_ipcw(time: Floats, event: Flags, risk: Floats, censoring: Censoring, *, tau: float = np.inf) -> float:
    """Uno's C: Harrell's with a pair weighing 1 / G(t_i)^2, t_i the earlier event, which must lie before tau.

    So it does not depend on how these studies were censored, as long as that has nothing to do with the risk (Uno et al. 2011).
    NaN where G is 0 or not known at an event before tau.
    """
    return weighted_concordance(time, event, risk, concordance_weights(time, event, censoring, tau=tau))


def concordance_weights(time: Floats, event: Flags, censoring: Censoring, *, tau: float = np.inf) -> Floats:
    """1 / G(t_i)^2 of an event before tau, 0 of all others; NaN where G is 0 or not known. (n,)."""
    weight = np.zeros(len(time))
    counts = event & (time < tau)
    weight[counts] = _inverse(censoring.at(time[counts])) ** 2
    return weight


def brier_score(time: Floats, event: Flags, survival: Floats, times: Floats, censoring: Censoring) -> Floats:
    """BS(t) at times (J,) of survival probabilities (n, J) (Graf et al. 1999), in [0, 1] but for the weights. (J,).

    The mean over studies of S(t)^2 / G(t_i) where the event was at t_i <= t, (1 - S(t))^2 / G(t) where t_i > t, and 0 where it was
    censored before. NaN where a G that counts is 0 or not known.
    """
    every = pointwise_brier_score(time, event, survival, times, censoring)
    return np.array([mean_or_nan(column) for column in every.T], dtype=np.float64)


def pointwise_brier_score(time: Floats, event: Flags, survival: Floats, times: Floats, censoring: Censoring) -> Floats:
    """What every study adds to BS(t), (n, J)."""
    died = event[:, None] & (time[:, None] <= times)
    alive = time[:, None] > times
    of_died = np.where(died, survival**2 * _inverse(censoring.at(time))[:, None], 0.0)
    of_alive = np.where(alive, (1 - survival) ** 2 * _inverse(censoring.at(times)), 0.0)
    return np.asarray(of_died + of_alive, dtype=np.float64)


def integrated_brier_score(time: Floats, event: Flags, survival: Floats, times: Floats, censoring: Censoring) -> float:
    """BS(t) integrated over rising times (J,) by the trapezoidal rule, divided by their span; NaN of fewer than two."""
    if len(times) < 2:
        return float("nan")
    return float(integrated_over(times, brier_score(time, event, survival, times, censoring)))


def integrated_over(times: Floats, scores: Floats) -> Floats:
    """Scores (..., J) at rising times (J,) integrated by the trapezoidal rule, divided by their span. (...)."""
    return np.asarray(np.trapezoid(scores, times) / (times[-1] - times[0]), dtype=np.float64)


def _inverse(probability: Floats) -> Floats:
    """1 / G, NaN where G is 0 or not known."""
    return np.asarray(1 / np.where(probability > 0, probability, np.nan), dtype=np.float64)


def weighted_concordance(time: Floats, event: Flags, risk: Floats, weight: Floats) -> float:
    """Pairs won, a tie being half a pair, over all comparable pairs; a pair weighs what its earlier event (n,) does."""
    # The latest first and, of one time, the censored first: then whom an event is compared with are the first `stop` of all.
    order = np.lexsort((event, -time))
    censored = np.sort(time[~event])
    later = len(time) - np.searchsorted(np.sort(time), time, side="right")
    stop = later + np.searchsorted(censored, time, side="right") - np.searchsorted(censored, time, side="left")
    rank = np.unique(risk, return_inverse=True)[1]
    below, up_to = (_count_below(rank[order], stop[event], rank[event] + more) for more in (0, 1))
    comparable = float(np.sum(weight[event] * stop[event]))
    return float(np.sum(weight[event] * (below + up_to))) / (2 * comparable) if comparable != 0 else float("nan")


def concordance_of_resamples(time: Floats, event: Flags, risk: Floats, counts: Floats) -> Floats:
    """`concordance_index` of R resamples at once; counts (R, n) says how often each study occurs in each of them. (R,).

    A study that is drawn twice is no pair with itself: its copies have one time. In blocks, so that memory rises with n alone.
    """
    won, comparable = (np.zeros(len(counts)) for _ in range(2))
    for start in range(0, len(time), _BLOCK):
        first = slice(start, start + _BLOCK)
        pairs = event[first, None] & ((time > time[first, None]) | (~event & (time == time[first, None])))
        score = pairs * ((risk < risk[first, None]) + 0.5 * (risk == risk[first, None]))
        comparable += np.sum(counts[:, first] * (counts @ pairs.T.astype(np.float64)), axis=1)
        won += np.sum(counts[:, first] * (counts @ score.T), axis=1)
    return np.asarray(np.divide(won, comparable, out=np.full(len(counts), np.nan), where=comparable > 0), dtype=np.float64)


def _count_below(values: Integers, stop: Integers, bound: Integers) -> Integers:
    """How many of values[:stop] (n,) are below bound, for each pair of stop and bound (q,), in O((n + q) log n). (q,).

    By the bits of the values from the highest on, a wavelet matrix: values are parted by each bit, those with 0 first, and a
    stretch of them stays a stretch. Where the bound has a 1, all of the stretch that have a 0 are below it.
    """
    start, stop, count = np.zeros_like(stop), stop.copy(), np.zeros_like(stop)
    for bit in reversed(range(int(max(values.max(initial=0), bound.max(initial=0))).bit_length())):
        one = (values >> bit) & 1 == 1
        zeros = np.concatenate([[0], np.cumsum(~one)])
        low, high, up = zeros[start], zeros[stop], (bound >> bit) & 1 == 1
        count += np.where(up, high - low, 0)
        start = np.where(up, zeros[-1] + start - low, low)
        stop = np.where(up, zeros[-1] + stop - high, high)
        values = np.concatenate([values[~one], values[one]])
    return count
