"""What is left of alarms where the least certain studies go without an answer."""

import numpy as np
from findings_study import AS_THEY_ARE, Study
from findings_tables import Table

from draf_dist.evaluation.statistics import Floats, Rows

THRESHOLD, COVERAGES = 0.2, (1.0, 0.95, 0.9, 0.8)


def abstention(study: Study) -> Table:
    """Recall and PPV of alarms at p >= .2 where the least certain studies go without an answer, by the share answered."""
    found: Table = {}
    pooled = [study.pooled(study.prepared.job.reference, seed, AS_THEY_ARE) for seed in study.seeds]
    probability, label = np.array([one.probability[:, 1] for one in pooled]), pooled[0].label
    for coverage in COVERAGES:
        for place, name in enumerate(("recall", "PPV", "alarms")):

            def value(rows: Rows, place: int = place, coverage: float = coverage) -> float:
                each = [alarms(one[rows], label[rows], threshold=THRESHOLD, coverage=coverage)[place] for one in probability]
                return float(np.mean(each))

            found.setdefault(f"{coverage:.0%} answered", {})[name] = study.of_studies(value)
    return found


def alarms(probability: Floats, label: Rows, *, threshold: float, coverage: float) -> tuple[float, float, float]:
    """Recall, PPV and number of alarms, answered studies with p >= threshold; recall is of all positives, answered or not.

    Answered are those whose max(p, 1 - p) is at least the (1 - coverage) quantile. Recall is NaN where there is no positive, PPV
    where there is no alarm.
    """
    certainty = np.maximum(probability, 1 - probability)
    alarm = (certainty >= np.quantile(certainty, 1 - coverage)) & (probability >= threshold)
    right, positive, number = (float(one.sum()) for one in (label[alarm] == 1, label == 1, alarm))
    return right / positive if positive else float("nan"), right / number if number else float("nan"), number
