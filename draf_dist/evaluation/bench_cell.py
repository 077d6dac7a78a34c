"""One cell of a benchmark: one system, trained without one fold, predicts that fold, as it is and under every condition."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from rich.console import Console

from draf_dist.config.spec import fingerprint
from draf_dist.data.loader import evaluation_batches
from draf_dist.data.normalise import Normaliser
from draf_dist.data.release import Release, open_release
from draf_dist.errors import DataError, explain
from draf_dist.evaluation.baselines import BaselineConfig, ClassBaseline, Classifier, examples_of, predict_baseline, read_examples
from draf_dist.evaluation.bench_conditions import BenchCondition, Disturbed, condition_file
from draf_dist.evaluation.cox_baseline import CoxBaseline
from draf_dist.evaluation.cox_regression import CoxRegressionConfig
from draf_dist.evaluation.predict import Predictor, check_coverage
from draf_dist.evaluation.predictions import Applied, Predictions, file_name, read_predictions, write_predictions
from draf_dist.evaluation.scoring import temperature_of
from draf_dist.evaluation.subject import Subject, open_subject
from draf_dist.metrics.temperature import Temperature
from draf_dist.schema.batch import Batch
from draf_dist.schema.record import Record
from draf_dist.schema.release import Split
from draf_dist.storage import Store, open_store
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import git_commit
from draf_dist.training.run import train
from draf_dist.training.torch_engine import OneProcess

RESULT, RUN = "cell.json", "run"
# Validation fits the temperature; `ood` holds the fold.
SPLITS: tuple[Split, ...] = ("val", "ood")
# Masks of predictions are the same in every cell, whatever the seed of training.
PREDICTION_SEED = 0


@dataclass(frozen=True)
class Cell:
    """What one cell is made of. release: URL@version of the fold; folder: URL of the folder of all cells.

    conditions: by name; predictions under them lie in files of their own, so a new one asks for no other training.
    """

    system: str
    fold: int
    seed: int
    work: FinetuneJob | BaselineConfig
    release: str
    passes: int
    batch_size: int
    folder: str
    conditions: tuple[tuple[str, BenchCondition], ...] = ()

    @property
    def identity(self) -> str:
        """What decides its numbers: 64 hex digits. Where it lies and what it is called are no part of it."""
        work = self.work.model_dump(mode="json", exclude={"name", "release", "seed"})
        version = self.release.rpartition("@")[2]
        settings = {"seed": self.seed, "passes": self.passes, "prediction_seed": PREDICTION_SEED}
        return fingerprint({"work": work, "release": version, **settings})

    @property
    def url(self) -> str:
        """Its folder: the same cell is found again, a changed one gets another."""
        return f"{self.folder}/{self.system}/fold-{self.fold}-seed-{self.seed}-{self.identity[:8]}"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.system}, fold {self.fold}, seed {self.seed}"


class CellResult(Record):
    """cell.json, written last. wall_s: of the attempt that finished it; steps: of training, 0 for a baseline."""

    format: Literal[1] = 1
    identity: str
    temperature: Temperature
    steps: int
    best_step: int
    wall_s: float
    git_commit: str | None


class _Model(Protocol):
    """What a cell has trained. steps, best_step: of its training."""

    steps: int
    best_step: int

    @property
    def release(self) -> Release: ...

    @property
    def normaliser(self) -> Normaliser: ...

    def predict(self, batches: Iterable[Batch], split: Split, applied: Applied) -> Predictions: ...


def run_cell(cell: Cell) -> CellResult:
    """Trains, fits the temperature on validation, predicts the fold as it is and under every condition, and stores all of it.

    What is stored already is only read. Training that was interrupted or killed goes on from its newest checkpoint; of a finished
    one the exported model is used again.

    Raises:
        InterruptedRunError: it was asked to stop; the training it was at has a checkpoint.
        DrafError: training diverged, or files are damaged.
    """
    store = open_store(cell.url)
    found, waiting = read_result(store, cell), _waiting(store, cell)
    if found is not None and not waiting:
        return found
    began = time.perf_counter()
    model = _model_of(cell)
    if found is None:
        found = _predict_clean(cell, model, store, began)
    if waiting:
        disturbed = Disturbed(model.release, "ood", model.normaliser, cell.batch_size, seed=PREDICTION_SEED)
        for name, condition in waiting:
            parts = [model.predict(batches, "ood", applied) for applied, batches in disturbed.under(condition)]
            write_predictions(store, condition_file(name, condition), parts)
    return found


def _model_of(cell: Cell) -> _Model:
    match cell.work:
        case FinetuneJob():
            return _Network(cell, cell.work)
        case CoxRegressionConfig():
            return CoxBaseline(cell.work, open_release(cell.release), cell.batch_size)
        case _:
            return _Baseline(cell, cell.work)


def _predict_clean(cell: Cell, model: _Model, store: Store, began: float) -> CellResult:
    predictions = {}
    for split in SPLITS:
        batches = map(model.normaliser, evaluation_batches(model.release, split, cell.batch_size))
        predictions[split] = model.predict(batches, split, Applied())
        check_coverage(predictions[split], model.release.manifest.receipts[split])
        write_predictions(store, file_name(split), [predictions[split]])
    result = CellResult(
        identity=cell.identity,
        temperature=temperature_of(predictions["val"]),
        steps=model.steps,
        best_step=model.best_step,
        wall_s=time.perf_counter() - began,
        git_commit=git_commit(),
    )
    store.write(RESULT, result.model_dump_json(indent=1).encode() + b"\n")
    return result


def read_result(store: Store, cell: Cell) -> CellResult | None:
    """What a finished cell found; None before that.

    Raises:
        DataError: cell.json is damaged or another cell's.
    """
    if not store.exists(RESULT):
        return None
    try:
        result = CellResult.model_validate_json(store.read(RESULT))
    except ValidationError as error:
        raise _unusable(store, "something else") from error
    if result.identity != cell.identity:
        raise _unusable(store, "another cell's")
    return result


def is_finished(cell: Cell) -> bool:
    """Whether there is nothing left to do."""
    store = open_store(cell.url)
    return read_result(store, cell) is not None and not _waiting(store, cell)


def fold_predictions(cell: Cell) -> Predictions:
    """What a finished cell predicted of `ood`, temperature not applied."""
    (found,) = read_predictions(open_store(cell.url), file_name("ood"))
    return found


def condition_predictions(cell: Cell, name: str) -> list[Predictions]:
    """The same under a condition, by case."""
    return read_predictions(open_store(cell.url), condition_file(name, dict(cell.conditions)[name]))


class _Network:
    """A fusion model, trained or, where that is done, only read."""

    def __init__(self, cell: Cell, work: FinetuneJob) -> None:
        job = work.model_copy(update={"release": cell.release, "seed": cell.seed})
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result = train(job, f"{cell.url}/{RUN}", console=Console(quiet=True), backend=OneProcess(device=device))
        self.steps, self.best_step = result.steps, result.best_step
        self._subject: Subject = open_subject(result.url, None)
        self._predictor = Predictor(self._subject.exported.model, self._subject.release.schema, cell.passes, PREDICTION_SEED)

    @property
    def release(self) -> Release:
        """That of the fold."""
        return self._subject.release

    @property
    def normaliser(self) -> Normaliser:
        """With what training has seen."""
        return self._subject.normaliser

    def predict(self, batches: Iterable[Batch], split: Split, applied: Applied) -> Predictions:
        """Of normalised batches."""
        return self._predictor.predict(batches, split=split, applied=applied)


class _Baseline:
    """A model without a network; it is fitted when something is to be predicted."""

    steps, best_step = 0, 0

    def __init__(self, cell: Cell, work: ClassBaseline) -> None:
        self._work, self._batch_size = work, cell.batch_size
        self.release = open_release(cell.release)
        self.normaliser = Normaliser(self.release.schema, self.release.stats)

    @cached_property
    def _fitted(self) -> tuple[Classifier, NDArray[np.int64]]:
        """The model, and the labels that it was shown."""
        shown = read_examples(self.release, "train", self._batch_size, self._work.corrupted).labelled()
        val = read_examples(self.release, "val", self._batch_size).labelled()
        return self._work.fit(shown, val), shown.label

    def predict(self, batches: Iterable[Batch], split: Split, applied: Applied) -> Predictions:
        """Of normalised batches."""
        model, seen = self._fitted
        found = predict_baseline(model, seen, examples_of(batches, self.release.schema), self.release, split)
        return replace(found, applied=applied)


def _waiting(store: Store, cell: Cell) -> list[tuple[str, BenchCondition]]:
    """Conditions under which it has not predicted yet."""
    return [(name, condition) for name, condition in cell.conditions if not store.exists(condition_file(name, condition))]


def _unusable(store: Store, found: str) -> DataError:
    remedy = "Remove the cell's folder and run the same command again."
    return DataError(explain(store.where(RESULT), expected="the result of this cell", found=found, remedy=remedy))
