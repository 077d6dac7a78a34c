"""From the folds' predictions to the rows of the table: pooled out of fold, with intervals and paired differences over subjects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.receipts import receipt
from draf_dist.errors import DataError, explain
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.results import Floor, Metrics
from draf_dist.evaluation.scores import Scored, short_scores
from draf_dist.evaluation.statistics import Estimate, Floats, Resamples, estimate
from draf_dist.metrics.calibration import ece_floor, top_label
from draf_dist.metrics.classification import auroc
from draf_dist.metrics.temperature import scale

SHOWN = ("auroc", "auprc", "nll", "brier", "ece")
FLOOR_REPLICATES = 200
ONE_CLASS = "needs studies of both kinds"


@dataclass(frozen=True)
class Pooled:
    """Out-of-fold predictions of one system and seed, in the order of uids: every study once. probability: temperature-scaled."""

    uid: NDArray[np.int64]
    fold: NDArray[np.int64]
    label: NDArray[np.int64]
    probability: Floats

    def labelled(self) -> "Pooled":
        """The studies whose label is known."""
        known = self.label >= 0
        return Pooled(self.uid[known], self.fold[known], self.label[known], self.probability[known])

    @property
    def scored(self) -> Scored:
        """As metrics take them."""
        return Scored(self.probability, self.label, np.zeros(len(self.label)))


def pool(
    parts: Sequence[Predictions], temperatures: Sequence[float], uids: Sequence[NDArray[np.int64]], *, everything: NDArray[np.int64]
) -> Pooled:
    """The predictions of all folds, end to end; parts, temperatures and uids (that the fold counts) in the order of folds.

    A subject with studies at sites of two folds is held out in both, so its studies are predicted twice: only the fold of a
    study's own site counts.

    Raises:
        DataError: what is left is not every study once.
    """
    kept = [part.rows(np.isin(part.uid, own)) for part, own in zip(parts, uids, strict=True)]
    uid = np.concatenate([part.uid for part in kept])
    if len(np.unique(uid)) != len(uid) or receipt(uid) != receipt(everything):
        expected, found = f"{len(everything)} studies, each once", f"{len(uid)} predictions of {len(np.unique(uid))} studies"
        remedy = "Run `draf release verify` on the folds' releases."
        raise DataError(explain("out-of-fold predictions", expected=expected, found=found, remedy=remedy))
    order = np.argsort(uid, kind="stable")
    scaled = [scale(part.probability.astype(np.float64), value) for part, value in zip(kept, temperatures, strict=True)]
    fold = np.concatenate([np.full(part.num_studies, number) for number, part in enumerate(kept)])
    target = np.concatenate([part.target for part in kept])
    return Pooled(uid[order], fold[order], target[order], np.concatenate(scaled)[order])


def replicate(systems: Mapping[str, Sequence[Pooled]], resamples: Resamples) -> dict[str, dict[str, Floats]]:
    """System -> metric -> (1 + R,): the number of all studies, then of every resample of subjects; each the mean over seeds.

    All systems and seeds meet the same resamples: differences of these numbers are paired. Seeds are averaged, not resampled:
    the interval is that of the mean over these seeds, for other subjects.
    """
    found: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in SHOWN} for name in systems}
    for rows in (np.arange(resamples.num_rows), *resamples):
        for name, seeds in systems.items():
            scores = [short_scores(pooled.scored.rows(rows)) for pooled in seeds]
            for metric in SHOWN:
                found[name][metric].append(float(np.mean([score[metric] for score in scores])))
    return {name: {metric: np.array(values) for metric, values in metrics.items()} for name, metrics in found.items()}


def metrics_of(replicates: Mapping[str, Floats]) -> Metrics:
    """The numbers with their intervals."""
    return {metric: _estimate(values) for metric, values in replicates.items()}


def differences_of(replicates: Mapping[str, Floats], reference: Mapping[str, Floats]) -> Metrics:
    """System - reference with paired intervals."""
    return {metric: _estimate(values - reference[metric]) for metric, values in replicates.items()}


def floor_of(seeds: Sequence[Pooled], seed: int) -> Floor:
    """ECE of perfectly calibrated models with these confidences, the mean over seeds."""
    confidences = [top_label(pooled.probability, pooled.label)[0] for pooled in seeds]
    floors = np.mean([ece_floor(values, replicates=FLOOR_REPLICATES, seed=seed) for values in confidences], axis=0)
    return Floor(mean=Estimate.of(floors[0]).value, high=Estimate.of(floors[1]).value)


def auroc_by_seed(seeds: Sequence[Pooled]) -> tuple[float | None, ...]:
    """The pooled AUROC of every seed."""
    return tuple(Estimate.of(auroc(pooled.probability, pooled.label)).value for pooled in seeds)


def auroc_by_fold(seeds: Sequence[Pooled], num_folds: int) -> tuple[float | None, ...]:
    """AUROC within every fold, the mean over seeds."""
    found = []
    for number in range(num_folds):
        rows = [(pooled.probability[pooled.fold == number], pooled.label[pooled.fold == number]) for pooled in seeds]
        found.append(Estimate.of(float(np.mean([auroc(*one) for one in rows]))).value)
    return tuple(found)


def _estimate(values: Floats) -> Estimate:
    return estimate(float(values[0]), values[1:], reason=ONE_CLASS)
