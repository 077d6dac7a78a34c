"""Whether two numbers rank studies alike, and when an uncertainty that does so with the risk deserves a warning (findings 1)."""

import numpy as np
from scipy.stats import rankdata

from draf_dist.metrics.classification import Floats

# |Spearman(U, p)| above which an uncertainty is a risk score by another name.
LARGEST_CORRELATION = 0.7
# Studies on which it is measured at least: a correlation of .7 over 20 has a 95 % interval of .37 to .87 (Fisher).
FEWEST = 20


def spearman(first: Floats, second: Floats) -> float:
    """Rank correlation of the pairs (n,) in which both are numbers; NaN below three pairs or where one does not vary.

    Pearson's correlation of the ranks, ties sharing their mean rank (Spearman 1904).
    """
    both = np.isfinite(first) & np.isfinite(second)
    first, second = first[both], second[both]
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def risk_correlation(uncertainty: Floats, risk: Floats) -> float:
    """Spearman(U, p) of validation (n,), not a number where the modality is absent; NaN below `FEWEST` studies that have it."""
    enough = np.count_nonzero(np.isfinite(uncertainty) & np.isfinite(risk)) >= FEWEST
    return spearman(uncertainty, risk) if enough else float("nan")


def correlation_warning(name: str, correlation: float, *, largest: float = LARGEST_CORRELATION) -> str | None:
    """What to tell a reader if an uncertainty ranks studies as their risk does, |Spearman(U, p)| > .7; else None.

    Var(p) is about [p (1 - p)]^2 Var(logit): at low prevalence it rises with p, and a weight that falls with it silences the
    modality that raises the alarm. name: of the modality.
    """
    if not abs(correlation) > largest:
        return None
    silenced = "that raises the alarm" if correlation > 0 else "where it sees no risk"
    return (
        f"Modality {name}: its uncertainty goes with its risk (Spearman {correlation:+.2f} on validation). A weight "
        f"that falls with it silences the modality {silenced}. See u_space and reliability in docs/models.md."
    )
