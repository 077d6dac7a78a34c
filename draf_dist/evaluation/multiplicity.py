"""Many comparisons with one reference: p-values of paired differences, and Holm's correction for their number."""

from collections.abc import Mapping

import numpy as np

from draf_dist.evaluation.statistics import Floats


def bootstrap_p(replicates: Floats) -> float | None:
    """Two-sided p of "the difference is 0" from its resamples (R,), NaN where a resample does not define it; None without any.

    2 (1 + the number on the rarer side of 0, 0 counting for both) / (1 + R), at most 1: the level at which the percentile interval
    touches 0 (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 4.4). No p is below 2 / (1 + R).
    """
    defined = replicates[~np.isnan(replicates)]
    if len(defined) == 0:
        return None
    rarer = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    return min(1.0, 2 * (1 + rarer) / (1 + len(defined)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p by name: the chance of even one false rejection among all is at most the level, however they depend.

    The k-th smallest of n is multiplied by n - k + 1, and none is below the one before it (Holm, Scandinavian Journal of Statistics
    6, 1979).
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
