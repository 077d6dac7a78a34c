"""The stored predictions of a finished benchmark, as the tables of findings read them: by system, seed and condition."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike

from draf_dist.data.corruption.missing import with_present
from draf_dist.data.loader import evaluation_batches
from draf_dist.evaluation.bench import Counted, Prepared, Truth, result_of, subject_numbers
from draf_dist.evaluation.bench_cell import (
    PREDICTION_SEED,
    RUN,
    Cell,
    CellResult,
    condition_predictions,
    fold_predictions,
)
from draf_dist.evaluation.bench_scores import Pooled
from draf_dist.evaluation.predict import Predictor
from draf_dist.evaluation.predictions import Applied, Predictions, concatenate, read_predictions, write_predictions
from draf_dist.evaluation.statistics import Estimate, Floats, Resamples, Rows, estimate
from draf_dist.evaluation.subject import Subject, open_subject
from draf_dist.schema.batch import Batch
from draf_dist.schema.modality import DataSchema
from draf_dist.sources.synth.truth import TruthRow
from draf_dist.storage import open_store

CLEAN, WITHOUT = "clean", "without"
REPLICATES = 500
# Condition and case (a modality, or "all").
Where = tuple[str, str]
AS_THEY_ARE: Where = (CLEAN, "all")
# A number of every study, (n,).
Read = Callable[[Predictions], ArrayLike]
# Of a seed's place and rows.
Statistic = Callable[[int, Rows], float]


class Silent:
    """Who is told how a benchmark's folds and cells go, and says nothing: all of them are there."""

    def fold(self, number: int, num_folds: int) -> None:
        """A fold's release is there."""

    def cell(self, cell: Cell, result: CellResult, finished: int, total: int) -> None:
        """A cell is finished."""

    def failed(self, cell: Cell, message: str) -> None:
        """A cell failed."""

    def scoring(self) -> None:
        """All cells are there."""


@dataclass(frozen=True)
class Study:
    """A benchmark whose cells are finished. truth: planted, or None."""

    prepared: Prepared
    truth: Truth | None

    @cached_property
    def counted(self) -> Counted:
        """The studies that each fold counts."""
        return Counted.of(self.prepared)

    @property
    def own(self) -> tuple[Rows, ...]:
        """The uids that each fold counts."""
        return self.counted.own

    @property
    def schema(self) -> DataSchema:
        """Of every fold."""
        return self.prepared.releases[0].schema

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Of training."""
        return self.prepared.job.seeds

    def predictions(self, system: str, seed: int, where: Where) -> list[Predictions]:
        """Of every fold, of the studies that it counts, in the order of uids; temperature not applied."""
        return self.of_folds([_of_cell(cell, where) for cell in self.cells(system, seed)])

    def of_folds(self, parts: Sequence[Predictions]) -> list[Predictions]:
        """Of every fold's predictions those of the studies that it counts, in the order of uids."""
        kept = [part.rows(np.isin(part.uid, own)).labelled() for part, own in zip(parts, self.own, strict=True)]
        return [part.rows(np.argsort(part.uid, kind="stable")) for part in kept]

    def pooled(self, system: str, seed: int, where: Where) -> Pooled:
        """Out of fold, temperature-scaled."""
        cells = self.cells(system, seed)
        return self.counted.pool([(cell, result_of(cell)) for cell in cells], [_of_cell(cell, where) for cell in cells])

    @cached_property
    def resamples(self) -> Resamples:
        """Of subjects, in the order of pooled studies."""
        number = subject_numbers(self.prepared.releases[0], self._first)
        return Resamples(number, replicates=REPLICATES, seed=0)

    def exact(self, where: Where) -> Floats:
        """The posterior (n, 2) of what is present under the condition, in the order of pooled studies; of planted truth alone."""
        assert self.truth is not None
        cells = self.cells(self.prepared.job.reference, self.seeds[0])
        return self.counted.exact([_of_cell(cell, where) for cell in cells], self.truth)

    @cached_property
    def fold(self) -> Rows:
        """(n,), in the order of pooled studies."""
        return self._first.fold

    @property
    def uid(self) -> Rows:
        """(n,), rising: the order of pooled studies."""
        return self._first.uid

    @cached_property
    def _first(self) -> Pooled:
        return self.pooled(self.prepared.job.reference, self.seeds[0], AS_THEY_ARE)

    def cells(self, system: str, seed: int) -> list[Cell]:
        """Of every fold."""
        return [cell for cell in self.prepared.cells if (cell.system, cell.seed) == (system, seed)]

    def signals(self, system: str, where: Where, read: Read) -> Floats:
        """A number of every study by every model, (seeds, n), in the order of pooled studies."""
        return np.array([in_order(self.predictions(system, seed, where), read) for seed in self.seeds])

    def by_model(self, statistics: Sequence[Statistic], rows: Rows) -> Floats:
        """Statistic(seed, rows of one fold), (statistics, seeds, folds).

        A model's signals are on a scale of their own, so they are ranked within one model alone.
        """
        folds = [rows[self.fold[rows] == number] for number in range(len(self.own))]
        seeds = range(len(self.seeds))
        return np.array([[[statistic(seed, own) for own in folds] for seed in seeds] for statistic in statistics])

    def over_models(self, *statistics: Statistic) -> Estimate:
        """The mean over statistics and models (a seed and a fold), with its interval over subjects."""
        return self.of_studies(lambda rows: float(np.mean(self.by_model(statistics, rows))))

    def of_studies(self, value: Callable[[Rows], float]) -> Estimate:
        """A number of rows of pooled studies, of all of them, with its interval over subjects."""
        return estimate(value(np.arange(len(self.fold))), np.array([value(rows) for rows in self.resamples]))


@dataclass(frozen=True)
class ImageStudy(Study):
    """The same, of which one modality is looked at. truth: with the severity that was planted in the files."""

    truth: Mapping[int, TruthRow] | None
    modality: str

    @cached_property
    def m(self) -> int:
        """Which of the modalities it is."""
        return self.schema.names.index(self.modality)


def in_order(parts: Sequence[Predictions], read: Read) -> Floats:
    """A number of every study of all folds, in the order of pooled studies."""
    every = concatenate(parts)
    return np.asarray(read(every), dtype=np.float64)[np.argsort(every.uid, kind="stable")]


def trained(cell: Cell) -> Subject:
    """The cell's model and the release of its fold."""
    return open_subject(f"{cell.url}/{RUN}", cell.release)


def _of_cell(cell: Cell, where: Where) -> Predictions:
    name, case = where
    if name == CLEAN:
        return fold_predictions(cell)
    if name == WITHOUT:
        return without(cell, case)
    (found,) = [part for part in condition_predictions(cell, name) if part.applied.modality == case]
    return found


def without(cell: Cell, modality: str) -> Predictions:
    """What the cell's model says of the fold with the modality removed; of a study that has nothing else, as it is."""
    store, path = open_store(cell.url), f"predictions/ood@without_{modality}.parquet"
    if not store.exists(path):
        subject = trained(cell)
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
