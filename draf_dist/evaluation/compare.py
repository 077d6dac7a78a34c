"""Corrupted against clean on the same studies: absolute values, paired differences, drops in percent."""

from functools import cached_property

import numpy as np

from draf_dist.evaluation.context import ONE_CLASS, Context
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.results import Metrics
from draf_dist.evaluation.scoring import TASKS, task_of
from draf_dist.evaluation.statistics import Estimate, Floats, estimate
from draf_dist.evaluation.task_scores import Scores


class Reference:
    """Clean, labelled predictions, with what every comparison with them needs worked out once."""

    def __init__(self, predictions: Predictions, context: Context) -> None:
        self.predictions, self.context = predictions, context
        self.scored = context.scored(predictions, scaled=True)
        self.primary = TASKS[task_of(predictions)].primary

    @cached_property
    def counts(self) -> Floats:
        """The resamples, (R, n); none where the studies are too few for an interval."""
        return self.context.resamples_of_group(self.predictions).counts()

    @cached_property
    def replicates(self) -> dict[str, Floats]:
        """The resampled metrics, (R,)."""
        return self.resampled(self.scored)

    @cached_property
    def values(self) -> dict[str, float]:
        """The metrics."""
        return self.scored.short()

    def resampled(self, scored: Scores) -> dict[str, Floats]:
        """The primary metric and NLL of the same resamples of any predictions of these studies."""
        nll = scored.pointwise_nll()
        return {
            self.primary: scored.primary_of_resamples(self.counts),
            "nll": self.counts @ nll / np.maximum(self.counts.sum(axis=1), 1),
        }

    def estimates(self) -> Metrics:
        """The metrics of the clean studies."""
        return _with_intervals(self.values, self.replicates)


def compare(reference: Reference, corrupted: Predictions) -> Metrics:
    """Metrics when corrupted; auroc_difference and nll_difference, clean - corrupted; auroc_drop_percent, of the clean value.

    Of another task its primary metric stands in place of AUROC. A drop in percent flatters weak models, so it never stands alone.
    All intervals resample the same subjects on both sides.

    Raises:
        ValueError: the two sides are not of the same studies.
    """
    if not np.array_equal(corrupted.uid, reference.predictions.uid):
        raise ValueError("a paired comparison needs the same studies in the same order on both sides")
    scored = reference.context.scored(corrupted, scaled=True)
    after, resampled = scored.short(), reference.resampled(scored)
    before, clean, name = reference.values, reference.replicates, reference.primary
    differences = {f"{metric}_difference": before[metric] - after[metric] for metric in clean}
    difference_replicates = {f"{metric}_difference": clean[metric] - resampled[metric] for metric in clean}
    with np.errstate(divide="ignore", invalid="ignore"):
        drop = 100 * np.float64(differences[f"{name}_difference"]) / np.float64(before[name])
        drops = 100 * difference_replicates[f"{name}_difference"] / clean[name]
    values = {**after, **differences, f"{name}_drop_percent": float(drop) if np.isfinite(drop) else float("nan")}
    replicates = {**resampled, **difference_replicates, f"{name}_drop_percent": np.where(np.isfinite(drops), drops, np.nan)}
    return _with_intervals(values, replicates)


def _with_intervals(values: dict[str, float], replicates: dict[str, Floats]) -> Metrics:
    return {
        name: estimate(value, replicates[name], reason=ONE_CLASS) if name in replicates else Estimate.of(value, reason=ONE_CLASS)
        for name, value in values.items()
    }
