"""Corrupted against clean on the same studies: absolute values, paired differences, drops in percent."""

from functools import cached_property

import numpy as np

from draf_dist.evaluation.describe import ONE_CLASS, Context
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.results import Metrics
from draf_dist.evaluation.scores import Scored, short_scores
from draf_dist.evaluation.statistics import Estimate, Floats, estimate
from draf_dist.metrics.calibration import pointwise_negative_log_likelihood
from draf_dist.metrics.classification import auroc_of_resamples


class Reference:
    """Clean, labelled predictions, with what every comparison with them needs worked out once."""

    def __init__(self, predictions: Predictions, context: Context) -> None:
        self.predictions, self.context = predictions, context
        self.scored = context.scored(predictions, scaled=True)

    @cached_property
    def counts(self) -> Floats:
        """The resamples, (R, n)."""
        return self.context.resamples(self.predictions).counts()

    @cached_property
    def replicates(self) -> dict[str, Floats]:
        """The resampled metrics, (R,)."""
        return self.resampled(self.scored)

    @cached_property
    def values(self) -> dict[str, float]:
        """The metrics."""
        return short_scores(self.scored)

    def resampled(self, scored: Scored) -> dict[str, Floats]:
        """AUROC and NLL of the same resamples of any predictions of these studies."""
        nll = pointwise_negative_log_likelihood(scored.probability, scored.label)
        return {
            "auroc": auroc_of_resamples(scored.probability, scored.label, self.counts),
            "nll": self.counts @ nll / np.maximum(self.counts.sum(axis=1), 1),
        }

    def estimates(self) -> Metrics:
        """The metrics of the clean studies."""
        return _with_intervals(self.values, self.replicates)


def compare(reference: Reference, corrupted: Predictions) -> Metrics:
    """Metrics when corrupted; auroc_difference and nll_difference, clean - corrupted; auroc_drop_percent, of the clean value.

    A drop in percent flatters weak models, so it never stands alone. All intervals resample the same subjects on both sides.

    Raises:
        ValueError: the two sides are not of the same studies.
    """
    if not np.array_equal(corrupted.uid, reference.predictions.uid):
        raise ValueError("a paired comparison needs the same studies in the same order on both sides")
    scored = reference.context.scored(corrupted, scaled=True)
    after, resampled = short_scores(scored), reference.resampled(scored)
    before, clean = reference.values, reference.replicates
    differences = {f"{name}_difference": before[name] - after[name] for name in clean}
    difference_replicates = {f"{name}_difference": clean[name] - resampled[name] for name in clean}
    with np.errstate(divide="ignore", invalid="ignore"):
        drop = 100 * np.float64(differences["auroc_difference"]) / np.float64(before["auroc"])
        drops = 100 * difference_replicates["auroc_difference"] / clean["auroc"]
    values = {**after, **differences, "auroc_drop_percent": float(drop) if np.isfinite(drop) else float("nan")}
    replicates = {**resampled, **difference_replicates, "auroc_drop_percent": np.where(np.isfinite(drops), drops, np.nan)}
    return _with_intervals(values, replicates)


def _with_intervals(values: dict[str, float], replicates: dict[str, Floats]) -> Metrics:
    return {
        name: estimate(value, replicates[name], reason=ONE_CLASS) if name in replicates else Estimate.of(value, reason=ONE_CLASS)
        for name, value in values.items()
    }
