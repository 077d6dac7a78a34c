"""Two methods over the same few repetitions: the paired t-test, and how large the difference is."""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from draf_dist.metrics.classification import Floats


@dataclass(frozen=True)
class PairedT:
    """mean: of the differences; low, high: its 95 % interval. t, p: two-sided, NaN where the differences do not vary."""

    mean: float
    low: float
    high: float
    t: float
    p: float
    degrees: int


def paired_t(first: Floats, second: Floats) -> PairedT:
    """Student's t-test of the differences first - second of n pairs, (n,) each, with n - 1 degrees of freedom.

    A pair is one seed and one split, the same for both (DRAF proposal 3.4; spec 1.1 row 13). With five of them a p says little of
    other data: the interval belongs beside it, and Holm's correction where there are several comparisons
    (evaluation/multiplicity.py).

    Raises:
        ValueError: fewer than two pairs, or not as many of one as of the other.
    """
    if first.shape != second.shape or len(first) < 2:
        raise ValueError(f"expected two or more pairs, found {first.shape} and {second.shape}")
    difference = first - second
    degrees, mean = len(difference) - 1, float(difference.mean())
    error = float(difference.std(ddof=1)) / np.sqrt(len(difference))
    reach = error * float(stdtrit(degrees, 0.975))
    if error == 0:
        return PairedT(mean, mean, mean, float("nan"), float("nan"), degrees)
    t = mean / error
    return PairedT(mean, mean - reach, mean + reach, float(t), float(2 * stdtr(degrees, -abs(t))), degrees)
