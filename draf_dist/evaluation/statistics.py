"""Intervals: the subject-level bootstrap, and an Estimate that is never NaN."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from draf_dist.schema.record import Record

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Statistics = Callable[[Rows], dict[str, float]]

LEVEL = 0.95
UNDEFINED = "not defined on these studies"
# Fewer defined replicates than this and the quantiles would describe a selected part of the resamples.
SMALLEST_DEFINED_SHARE = 0.8


class Estimate(Record):
    """A number of the report with its 95 % interval; where one is null, `reason` says why.

    undefined_replicates: resamples in which the number did not exist (for instance held one class only), left out of the interval.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    undefined_replicates: int = 0

    @classmethod
    def of(cls, value: float, *, reason: str = UNDEFINED) -> "Estimate":
        """A number without an interval; NaN becomes null with the reason."""
        return cls(value=None, reason=reason) if np.isnan(value) else cls(value=value)


class Resamples:
    """Resamples of subjects, not rows: all studies of a drawn subject come along, so studies of one subject stay together.

    The draws depend on (seed, replicate) and the number of subjects alone, so two statistics over the same studies see the same
    resamples, and their difference is a paired one.
    """

    def __init__(self, subject: Rows, *, replicates: int, seed: int) -> None:
        """subject: (n,), any integers; rows with the same one belong together."""
        _, index = np.unique(subject, return_inverse=True)
        order = np.argsort(index, kind="stable")
        self._replicates, self.seed = replicates, seed
        self.num_rows = len(subject)
        self.num_subjects = int(index.max()) + 1 if len(subject) else 0
        self._rows_of = np.split(order, np.cumsum(np.bincount(index))[:-1]) if len(subject) else []

    def __iter__(self) -> Iterator[Rows]:
        """Row indices of every replicate."""
        generator = np.random.default_rng(self.seed)
        one_row_each = self.num_rows == self.num_subjects
        single = np.array([rows[0] for rows in self._rows_of], dtype=np.int64) if one_row_each else None
        for _ in range(self._replicates if self.num_subjects else 0):
            drawn = generator.integers(0, self.num_subjects, self.num_subjects)
            yield single[drawn] if single is not None else np.concatenate([self._rows_of[subject] for subject in drawn])

    def counts(self) -> Floats:
        """How often each row occurs in every replicate, (replicates, n)."""
        drawn = [np.bincount(rows, minlength=self.num_rows) for rows in self]
        return np.array(drawn, dtype=np.float64).reshape(len(drawn), self.num_rows)


def estimate_all(
    statistics: Statistics, resamples: Resamples, *, reason: str = "not defined on these studies"
) -> dict[str, Estimate]:
    """Every statistic on all rows, with its percentile interval over the resamples.

    Percentile intervals of a biased statistic carry the bias twice: that of ECE lies high at small n, which is why the report
    prints the ECE floor beside it.
    """
    values = statistics(np.arange(resamples.num_rows))
    replicates: dict[str, list[float]] = {name: [] for name in values}
    for rows in resamples:
        for name, value in statistics(rows).items():
            replicates[name].append(value)
    return {name: estimate(value, np.array(replicates[name]), reason=reason) for name, value in values.items()}


def estimate(value: float, replicates: Floats, *, reason: str = UNDEFINED) -> Estimate:
    """A number with the percentile interval of its replicates, (R,), NaN where a resample does not define it."""
    if np.isnan(value):
        return Estimate(value=None, reason=reason)
    defined = replicates[~np.isnan(replicates)]
    undefined = len(replicates) - len(defined)
    if len(defined) < max(1, SMALLEST_DEFINED_SHARE * len(replicates)):
        why = "too few studies for an interval" if len(replicates) else "no resamples were asked for"
        return Estimate(value=value, reason=why, undefined_replicates=undefined)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value=value, low=float(low), high=float(high), undefined_replicates=undefined)
