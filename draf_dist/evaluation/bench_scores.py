"""From the folds' predictions to the rows of the table: pooled out of fold, with intervals and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.receipts import receipt
from draf_dist.errors import DataError, explain
from draf_dist.evaluation.bench_results import SeedTest
from draf_dist.evaluation.follow_up import FollowUp
from draf_dist.evaluation.label_scores import LabelScores
from draf_dist.evaluation.multiplicity import bootstrap_p, holm
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.results import Floor, Metrics
from draf_dist.evaluation.scores import Scored
from draf_dist.evaluation.scoring import TASKS, AnyScores, scaled_probability, scores_of
from draf_dist.evaluation.statistics import Estimate, Floats, Resamples, estimate
from draf_dist.evaluation.task_scores import TaskName
from draf_dist.evaluation.time_scores import TimeScores
from draf_dist.metrics.calibration import ece_floor, top_label
from draf_dist.metrics.paired import paired_t

SHOWN: dict[TaskName, tuple[str, ...]] = {
    "class": ("auroc", "auprc", "nll", "brier", "ece"),
    "multilabel": ("auroc", "auprc", "nll", "brier", "ece"),
    "survival": ("c_index", "c_index_ipcw", "nll", "ibs"),
}
NO_FLOOR = Floor(mean=None, high=None)
FLOOR_REPLICATES = 200
ONE_CLASS = "needs studies of both kinds"


@dataclass(frozen=True)
class Pooled:
    """Out-of-fold predictions of one system and seed, in the order of uids: every study once. probability: temperature-scaled.

    label: as Predictions.target. other: the scores of labels or times, where these are asked for.
    """

    uid: NDArray[np.int64]
    fold: NDArray[np.int64]
    label: NDArray[np.int64]
    probability: Floats
    other: LabelScores | TimeScores | None = None

    def rows(self, index: NDArray[np.int64]) -> "Pooled":
        """Some of the studies."""
        other = None if self.other is None else self.other.rows(index)
        return Pooled(self.uid[index], self.fold[index], self.label[index], self.probability[index], other)

    def labelled(self) -> "Pooled":
        """The studies whose label is known."""
        return self.rows(np.flatnonzero(self.label >= 0))

    @property
    def scored(self) -> AnyScores:
        """As metrics take them."""
        return Scored(self.probability, self.label, np.zeros(len(self.label))) if self.other is None else self.other

    @property
    def task(self) -> TaskName:
        """What was asked for."""
        match self.other:
            case LabelScores():
                return "multilabel"
            case TimeScores():
                return "survival"
            case None:
                return "class"

    @property
    def counts(self) -> tuple[int, ...]:
        """Studies of every class from 0 on; with every label; censored, and with an event."""
        match self.other:
            case LabelScores():
                return tuple(int(number) for number in (self.other.label & self.other.observed).sum(axis=0))
            case TimeScores():
                return tuple(int(number) for number in np.bincount(self.other.event.astype(np.int64), minlength=2))
            case None:
                return tuple(int(number) for number in np.bincount(self.label, minlength=self.probability.shape[1]))


def pool(
    parts: Sequence[Predictions],
    temperatures: Sequence[float],
    uids: Sequence[NDArray[np.int64]],
    *,
    everything: NDArray[np.int64],
    follow_ups: Sequence[FollowUp | None] | None = None,
) -> Pooled:
    """The predictions of all folds, end to end; parts, temperatures and uids (that the fold counts) in the order of folds.

    follow_ups: of the training subjects of every fold, for times alone: each study is scored by those of its own model, and all up
    to the same horizon.

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
    scaled = [scaled_probability(part, value) for part, value in zip(kept, temperatures, strict=True)]
    fold = np.concatenate([np.full(part.num_studies, number) for number, part in enumerate(kept)])
    target = np.concatenate([part.target for part in kept])
    other = _other_scores(kept, temperatures, follow_ups or [None] * len(kept))
    return Pooled(uid, fold, target, np.concatenate(scaled), other).rows(order)


def _other_scores(
    parts: Sequence[Predictions], temperatures: Sequence[float], follow_ups: Sequence[FollowUp | None]
) -> LabelScores | TimeScores | None:
    """Those of labels or times, end to end; None of classes."""
    if parts[0].answers is None:
        return None
    triples = zip(parts, follow_ups, temperatures, strict=True)
    each = [scores_of(part, follow_up, temperature) for part, follow_up, temperature in triples]
    kind = type(each[0])
    assert issubclass(kind, LabelScores | TimeScores)
    return kind(*(np.concatenate([getattr(one, field.name) for one in each]) for field in fields(kind)))


def replicate(systems: Mapping[str, Sequence[Pooled]], resamples: Resamples) -> dict[str, dict[str, Floats]]:
    """System -> metric -> (1 + R,): the number of all studies, then of every resample of subjects and seeds; see over_seeds.

    All systems and seeds meet the same resamples: differences of these numbers are paired.
    """
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in systems}
    for rows in (np.arange(resamples.num_rows), *resamples):
        for name, seeds in systems.items():
            found[name].append([pooled.scored.rows(rows).short() for pooled in seeds])
    return {
        name: {
            metric: over_seeds(np.array([[score[metric] for score in scores] for scores in each]).T, seed=resamples.seed)
            for metric in SHOWN[systems[name][0].task]
        }
        for name, each in found.items()
    }


def over_seeds(values: Floats, *, seed: int) -> Floats:
    """Numbers of every training seed (S, 1 + R), the first of all studies, to (1 + R,): the mean over seeds; resamples draw them.

    So an interval speaks of other subjects and of other training seeds; with one seed, of subjects alone. The draws depend on
    (S, R, seed): systems with equally many seeds meet the same ones, and what luck of a seed they share cancels.
    """
    num_seeds, num_all = values.shape
    # Not the generator that subjects are drawn with.
    generator = np.random.default_rng((seed, 1))
    drawn = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_all - 1)
    shares = np.concatenate([np.ones((1, num_seeds)), drawn]) / num_seeds
    # A seed that was not drawn has no say, not even with a number that is not defined.
    return np.asarray(np.where(shares.T > 0, shares.T * values, 0.0).sum(axis=0), dtype=np.float64)


def metrics_of(replicates: Mapping[str, Floats]) -> Metrics:
    """The numbers with their intervals."""
    return {metric: _estimate(values) for metric, values in replicates.items()}


def differences_of(replicates: Mapping[str, Floats], reference: Mapping[str, Floats]) -> Metrics:
    """System - reference with paired intervals."""
    return {metric: _estimate(values - reference[metric]) for metric, values in replicates.items()}


def holm_of(replicates: Mapping[str, Mapping[str, Floats]], reference: str) -> dict[str, dict[str, float]]:
    """Metric -> system -> p of its difference to the reference, corrected for the number of systems that are compared."""
    adjusted = {}
    for metric, base in replicates[reference].items():
        raw = {system: bootstrap_p((found[metric] - base)[1:]) for system, found in replicates.items() if system != reference}
        adjusted[metric] = holm({system: p for system, p in raw.items() if p is not None})
    return adjusted


def floor_of(seeds: Sequence[Pooled], seed: int) -> Floor:
    """ECE of perfectly calibrated models with these confidences, the mean over seeds; of classes alone."""
    if seeds[0].task != "class":
        return NO_FLOOR
    confidences = [top_label(pooled.probability, pooled.label)[0] for pooled in seeds]
    floors = np.mean([ece_floor(values, replicates=FLOOR_REPLICATES, seed=seed) for values in confidences], axis=0)
    return Floor(mean=Estimate.of(floors[0]).value, high=Estimate.of(floors[1]).value)


def primary_by_seed(seeds: Sequence[Pooled]) -> tuple[float | None, ...]:
    """The pooled AUROC, or C-index, of every seed."""
    return tuple(Estimate.of(_primary(pooled)).value for pooled in seeds)


def seed_test(row: Sequence[float | None], reference: Sequence[float | None]) -> SeedTest | None:
    """Row - reference, a pair a training seed; None with fewer than two seeds, other numbers of them, or an unknown number."""
    pairs = [(a, b) for a, b in zip(row, reference, strict=False) if a is not None and b is not None]
    if len(pairs) < 2 or not len(pairs) == len(row) == len(reference):
        return None
    found = paired_t(*np.array(pairs).T)
    return SeedTest(mean=found.mean, low=found.low, high=found.high, p=Estimate.of(found.p).value)


def primary_by_fold(seeds: Sequence[Pooled], num_folds: int) -> tuple[float | None, ...]:
    """AUROC, or the C-index, within every fold, the mean over seeds."""
    found = []
    for number in range(num_folds):
        values = [_primary(pooled.rows(np.flatnonzero(pooled.fold == number))) for pooled in seeds]
        found.append(Estimate.of(float(np.mean(values))).value)
    return tuple(found)


def _primary(pooled: Pooled) -> float:
    return pooled.scored.short()[TASKS[pooled.task].primary]


def _estimate(values: Floats) -> Estimate:
    return estimate(float(values[0]), values[1:], reason=ONE_CLASS)
