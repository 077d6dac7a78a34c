"""The stored predictions of a finished benchmark, as findings_images.py reads them: by system, seed and condition."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from draf_dist.data.corruption.missing import with_present
from draf_dist.data.loader import evaluation_batches
from draf_dist.evaluation import bench_folds
from draf_dist.evaluation.bench import Prepared
from draf_dist.evaluation.bench_cell import PREDICTION_SEED, RUN, Cell, condition_predictions, fold_predictions, read_result
from draf_dist.evaluation.bench_scores import Pooled, pool
from draf_dist.evaluation.predict import Predictor
from draf_dist.evaluation.predictions import Applied, Predictions, concatenate, read_predictions, write_predictions
from draf_dist.evaluation.regret import posterior
from draf_dist.evaluation.statistics import Estimate, Floats, Resamples, estimate
from draf_dist.evaluation.subject import open_subject
from draf_dist.schema.batch import Batch
from draf_dist.storage import open_store

CLEAN, WITHOUT = "clean", "without"
REPLICATES = 500
Progress: Any = SimpleNamespace(fold=lambda *_: None, cell=lambda *_: None, failed=lambda *_: None, scoring=lambda: None)
# Condition and case (a modality, or "all").
Where = tuple[str, str]
# A number of every study, (n,).
Read = Callable[[Predictions], Any]
# Of a seed's place and rows.
Statistic = Callable[[int, Any], float]


@dataclass(frozen=True)
class Study:
    """A benchmark whose cells are finished. modality: the image. truth: planted, or None."""

    prepared: Prepared
    modality: str
    truth: Any

    @cached_property
    def own(self) -> list[Any]:
        """The uids that each fold counts."""
        pairs = zip(self.prepared.releases, self.prepared.plan.folds, strict=True)
        return [bench_folds.check_fold(release, fold) for release, fold in pairs]

    @cached_property
    def m(self) -> int:
        """Which of the modalities it is."""
        return self.prepared.releases[0].schema.names.index(self.modality)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Of training."""
        return self.prepared.job.seeds

    def predictions(self, system: str, seed: int, where: Where) -> list[Predictions]:
        """Of every fold, of the studies that it counts, in the order of uids; temperature not applied."""
        cells = [cell for cell in self.prepared.cells if (cell.system, cell.seed) == (system, seed)]
        found = [self._of_cell(cell, where) for cell in cells]
        kept = [part.rows(np.isin(part.uid, own)).labelled() for part, own in zip(found, self.own, strict=True)]
        return [part.rows(np.argsort(part.uid, kind="stable")) for part in kept]

    def _of_cell(self, cell: Cell, where: Where) -> Predictions:
        name, case = where
        if name == CLEAN:
            return fold_predictions(cell)
        if name == WITHOUT:
            return without(cell, self.modality)
        (found,) = [part for part in condition_predictions(cell, name) if part.applied.modality == case]
        return found

    def temperatures(self, system: str, seed: int) -> list[float]:
        """Of every fold."""
        cells = [cell for cell in self.prepared.cells if (cell.system, cell.seed) == (system, seed)]
        results = [read_result(open_store(cell.url), cell) for cell in cells]
        return [result.temperature.value for result in results if result is not None]

    def pooled(self, system: str, seed: int, where: Where) -> Pooled:
        """Out of fold, temperature-scaled."""
        parts = self.predictions(system, seed, where)
        everything = np.concatenate([part.uid for part in parts])
        return pool(parts, self.temperatures(system, seed), self.own, everything=everything)

    @cached_property
    def resamples(self) -> Resamples:
        """Of subjects, in the order of pooled studies."""
        uid = self.pooled(self.prepared.job.reference, self.seeds[0], (CLEAN, "all")).uid
        table = self.prepared.releases[0].subjects()
        _, numbers = np.unique(table["subject"].to_numpy(zero_copy_only=False), return_inverse=True)
        of_uid = dict(zip(table["uid"].to_pylist(), numbers.tolist(), strict=True))
        return Resamples(np.array([of_uid[int(one)] for one in uid]), replicates=REPLICATES, seed=0)

    def exact(self, where: Where) -> Floats:
        """The posterior (n, 2) of what is present under the condition, in the order of pooled studies."""
        parts = concatenate(self.predictions(self.prepared.job.reference, self.seeds[0], where))
        return posterior(parts.rows(np.argsort(parts.uid, kind="stable")), self.truth)

    def signals(self, system: str, where: Where, read: Read) -> Floats:
        """A number of every study by every model, (seeds, n), in the order of pooled studies."""
        rows = []
        for seed in self.seeds:
            parts = concatenate(self.predictions(system, seed, where))
            rows.append(np.asarray(read(parts), dtype=np.float64)[np.argsort(parts.uid, kind="stable")])
        return np.array(rows)

    @cached_property
    def fold(self) -> Any:
        """(n,), in the order of pooled studies."""
        return self.pooled(self.prepared.job.reference, self.seeds[0], (CLEAN, "all")).fold

    def over_models(self, statistic: Statistic) -> Estimate:
        """The mean over models (a seed and a fold) of statistic(seed, rows), rows of one fold, with its interval over subjects.

        A model's signals are on a scale of their own, so they are ranked within one model alone.
        """

        def value(rows: Any) -> float:
            folds = [rows[self.fold[rows] == number] for number in range(len(self.own))]
            return float(np.mean([statistic(seed, own) for seed in range(len(self.seeds)) for own in folds]))

        return estimate(value(np.arange(len(self.fold))), np.array([value(rows) for rows in self.resamples]))


def without(cell: Cell, modality: str) -> Predictions:
    """What the cell's model says of the fold with the modality removed; of a study that has nothing else, as it is."""
    store, path = open_store(cell.url), f"predictions/ood@without_{modality}.parquet"
    if not store.exists(path):
        subject = open_subject(f"{cell.url}/{RUN}", None)
        predictor = Predictor(subject.exported.model, subject.release.schema, cell.passes, PREDICTION_SEED)
        batches = map(subject.normaliser, evaluation_batches(subject.release, "ood", cell.batch_size))
        removed = (_removed(batch, modality) for batch in batches)
        found = predictor.predict(removed, split="ood", applied=Applied(WITHOUT, 1, modality))
        write_predictions(store, path, [found])
    (found,) = read_predictions(store, path)
    return found


def _removed(batch: Batch, modality: str) -> Batch:
    others = batch.present & torch.tensor([name != modality for name in batch.modalities])
    return with_present(batch, torch.where(others.any(1, keepdim=True), others, batch.present))
