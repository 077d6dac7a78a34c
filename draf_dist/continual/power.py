"""How many subjects a comparison needs before it can decide."""

import math

from scipy.stats import norm

SMALLEST_GAP = 1e-6


def subjects_needed(sd: float, gap: float, *, alpha: float, power: float) -> int | None:
    """Subjects with whom a one-sided test of level alpha finds a gap (nats) with this power; None where there is no gap.

    n = ((z_{1-alpha} + z_{power}) sd / gap)^2, sd being that of one subject's paired difference (Chow, Shao and Wang, Sample Size
    Calculations in Clinical Research, section 3.2: one mean, non-inferiority; the gap is the margin less the true difference).
    """
    if gap < SMALLEST_GAP:
        return None
    return max(1, math.ceil((float(norm.ppf(1 - alpha) + norm.ppf(power)) * sd / gap) ** 2))
