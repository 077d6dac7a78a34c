"""What the tables of findings read from predictions, and what they work out of it: signals of modalities, by model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from findings_study import Read, Statistic

from draf_dist.evaluation.statistics import Floats
from draf_dist.metrics.classification import auroc
from draf_dist.metrics.rank import spearman


def alone(m: int) -> Read:
    """What modality m itself gives for the probability of class 1, NaN where it is absent."""
    return lambda part: part.unimodal[:, m]


def uncertainty(kind: str, m: int) -> Read:
    """U of modality m, NaN where it is absent."""
    return lambda part: part.uncertainty[kind][:, m]


def corruption(m: int) -> Read:
    """c_hat of modality m, NaN where it is absent."""
    return lambda part: part.corruption_probability[:, m]


def weight(m: int) -> Read:
    """Of modality m where it is present, else NaN."""
    return lambda part: np.where(part.present, part.reliability, np.nan)[:, m]


def ranked(a: Floats, b: Floats) -> Statistic:
    """Spearman of two signals, (seeds, n) both."""
    return lambda seed, rows: spearman(a[seed, rows], b[seed, rows])


def averaged(values: Floats) -> Statistic:
    """The mean of what is a number, (seeds, n)."""
    return lambda seed, rows: float(np.nanmean(values[seed, rows]))


def told_apart(clean: Floats, hit: Floats) -> Statistic:
    """AUROC of hit against clean by a signal that rises, (seeds, n) both; NaN is left out."""

    def statistic(seed: int, rows: Any) -> float:
        both = np.concatenate([clean[seed, rows], hit[seed, rows]])
        label = np.repeat([0, 1], len(rows))
        known = np.isfinite(both)
        return float(auroc(np.stack([-both[known], both[known]], axis=1), label[known]))

    return statistic


def with_level(levels: Sequence[Floats]) -> Statistic:
    """Spearman of a signal with the level of corruption; the signal at each level, the least first, (seeds, n); NaN is left out."""

    def statistic(seed: int, rows: Any) -> float:
        values = np.concatenate([one[seed, rows] for one in levels])
        return spearman(values, np.repeat(np.arange(len(levels)), len(rows)).astype(np.float64))

    return statistic
