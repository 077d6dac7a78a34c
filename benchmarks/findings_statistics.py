"""What the tables of findings read from predictions, and what they work out of it: signals of modalities, by model."""

from collections.abc import Sequence

import numpy as np
from findings_study import Read, Statistic

from draf_dist.evaluation.statistics import Floats, Rows
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
    """AUROC of hit against clean by a signal that rises, (seeds, n) both; a study that is NaN in one of them is left out.

    So the studies of both are the same, and whom a condition hits more often cannot be told for what it does to them.
    """

    def statistic(seed: int, rows: Rows) -> float:
        known = rows[np.isfinite(clean[seed, rows]) & np.isfinite(hit[seed, rows])]
        both = np.concatenate([clean[seed, known], hit[seed, known]])
        return float(auroc(np.stack([-both, both], axis=1), np.repeat([0, 1], len(known))))

    return statistic


def with_level(signals: Sequence[Floats], levels: Sequence[float]) -> Statistic:
    """Spearman of a signal with the level of corruption; the signal at each of the levels, (seeds, n) each.

    A study that is NaN at one of the levels is left out, so those of every level are the same.
    """

    def statistic(seed: int, rows: Rows) -> float:
        known = rows[np.all([np.isfinite(one[seed, rows]) for one in signals], axis=0)]
        values = np.concatenate([one[seed, known] for one in signals])
        return spearman(values, np.repeat(np.asarray(levels, dtype=np.float64), len(known)))

    return statistic
