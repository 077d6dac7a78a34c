"""What abstaining buys: risk against coverage, its area, and what happens to each class on the way.

A model that may abstain keeps the studies it is most confident of. Coverage is the share kept, risk the share of errors among
those kept. Findings on real data: at low prevalence, confidence in the predicted class rejects the alarms first, so the
overall risk falls while the rare class is lost; therefore everything here exists by class too.
"""

from dataclasses import dataclass

import numpy as np

from draf_dist.metrics.calibration import mean_over_ties, top_label
from draf_dist.metrics.classification import Flags, Floats, Integers


@dataclass(frozen=True)
class ClassCurve:
    """What is left of one class as coverage falls. Each (n,), from one study kept to all.

    coverage: share of all studies kept. kept: share of this class kept. risk: share of errors among the kept of this class,
    NaN where none is kept.
    """

    coverage: Floats
    kept: Floats
    risk: Floats


@dataclass(frozen=True)
class AlarmCurve:
    """The rule "class 1 if its probability reaches the threshold" under abstention. Each (n,), from one study kept to all.

    ppv: TP / (TP + FP) among those kept, NaN before the first alarm. recall: TP kept / all positives, so a positive on which
    the model abstains counts as missed.
    """

    coverage: Floats
    ppv: Floats
    recall: Floats


def risk_coverage(confidence: Floats, error: Flags) -> tuple[Floats, Floats]:
    """Coverage k/n and risk among the k most confident, k = 1..n. Each (n,).

    Within a group of equal confidence any order is as good as another, so errors are spread evenly over the group.
    """
    shared = _by_confidence(confidence, error.astype(np.float64))
    kept = np.arange(1, len(error) + 1)
    return kept / max(len(error), 1), np.cumsum(shared) / kept


def aurc(confidence: Floats, error: Flags) -> float:
    """Area under the risk-coverage curve: the mean of the risks at k/n, k = 1..n. Lower is better; NaN without studies."""
    _, risk = risk_coverage(confidence, error)
    return float(risk.mean()) if len(risk) else float("nan")


def excess_aurc(confidence: Floats, error: Flags) -> float:
    """E-AURC: AURC less that of the best possible order of the same errors (all of them last); 0 is perfect."""
    return aurc(confidence, error) - aurc(-error.astype(np.float64), error)


def coverage_at_risk(confidence: Floats, error: Flags, *, risk: float) -> float:
    """The largest coverage whose risk is at most `risk`; 0 if none is.

    Only coverages that some threshold on the confidence reaches count: a group of equal confidence is kept whole or not at all.
    """
    if len(error) == 0:
        return float("nan")
    coverage, risks = risk_coverage(confidence, error)
    ordered = np.sort(confidence)[::-1]
    reachable = np.append(np.diff(ordered) != 0, True)
    allowed = coverage[reachable & (risks <= risk)]
    return float(allowed[-1]) if len(allowed) else 0.0


def class_curve(probability: Floats, label: Integers, class_index: int, confidence: Floats | None = None) -> ClassCurve:
    """Risk and share kept of the studies whose label is `class_index`; confidence is that in the predicted class by default."""
    top, hit = top_label(probability, label)
    confidence = top if confidence is None else confidence
    member = label == class_index
    kept = np.cumsum(_by_confidence(confidence, member.astype(np.float64)))
    wrong = np.cumsum(_by_confidence(confidence, (member & ~hit).astype(np.float64)))
    return ClassCurve(_coverage(len(label)), kept=_divide(kept, member.sum()), risk=_divide(wrong, kept))


def alarm_curve(probability: Floats, label: Integers, *, threshold: float, confidence: Floats | None = None) -> AlarmCurve:
    """PPV and recall of class 1 at a fixed threshold as coverage falls; confidence is that in the predicted class by default."""
    confidence = top_label(probability, label)[0] if confidence is None else confidence
    alarm = probability[:, 1] >= threshold
    positive = label == 1
    raised = np.cumsum(_by_confidence(confidence, alarm.astype(np.float64)))
    right = np.cumsum(_by_confidence(confidence, (alarm & positive).astype(np.float64)))
    return AlarmCurve(_coverage(len(label)), ppv=_divide(right, raised), recall=_divide(right, positive.sum()))


def _by_confidence(confidence: Floats, values: Floats) -> Floats:
    order = np.argsort(-confidence, kind="stable")
    return mean_over_ties(confidence[order], values[order])


def _coverage(num_studies: int) -> Floats:
    return np.arange(1, num_studies + 1, dtype=np.float64) / max(num_studies, 1)


def _divide(numerator: Floats, denominator: Floats | np.int64) -> Floats:
    spread = np.broadcast_to(np.asarray(denominator, dtype=np.float64), numerator.shape)
    result = np.full(numerator.shape, np.nan)
    np.divide(numerator, spread, out=result, where=spread > 0)
    return result
