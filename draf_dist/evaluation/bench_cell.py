"""One cell of a benchmark: one system, trained without one fold, predicts that fold."""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import ValidationError
from rich.console import Console

from draf_dist.config.spec import fingerprint
from draf_dist.data.loader import evaluation_batches
from draf_dist.data.release import open_release
from draf_dist.errors import DataError, explain
from draf_dist.evaluation.baselines import BaselineConfig, predict_baseline, read_examples
from draf_dist.evaluation.predict import Predictor, check_coverage
from draf_dist.evaluation.predictions import Predictions, file_name, read_predictions, write_predictions
from draf_dist.evaluation.subject import open_subject
from draf_dist.metrics.temperature import Temperature, fit_temperature
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
    """What one cell is made of. release: URL@version of the fold; folder: URL of the folder of all cells."""

    system: str
    fold: int
    seed: int
    work: FinetuneJob | BaselineConfig
    release: str
    passes: int
    batch_size: int
    folder: str

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


@dataclass(frozen=True)
class _Found:
    """Predictions by split, and how long training was."""

    predictions: dict[Split, Predictions]
    steps: int = 0
    best_step: int = 0


def run_cell(cell: Cell) -> CellResult:
    """Trains, fits the temperature on validation, predicts the fold and stores both; a finished cell is only read.

    Training that was interrupted or killed goes on from its newest checkpoint.

    Raises:
        InterruptedRunError: it was asked to stop; the training it was at has a checkpoint.
        DrafError: training diverged, or files are damaged.
    """
    store = open_store(cell.url)
    found = read_result(store, cell)
    if found is not None:
        return found
    began = time.perf_counter()
    made = _finetuned(cell, cell.work) if isinstance(cell.work, FinetuneJob) else _baseline(cell, cell.work)
    known = made.predictions["val"].labelled()
    for split in SPLITS:
        write_predictions(store, file_name(split), [made.predictions[split]])
    result = CellResult(
        identity=cell.identity,
        temperature=fit_temperature(known.probability.astype("float64"), known.target),
        steps=made.steps,
        best_step=made.best_step,
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
    return read_result(open_store(cell.url), cell) is not None


def fold_predictions(cell: Cell) -> Predictions:
    """What a finished cell predicted of `ood`, temperature not applied."""
    (found,) = read_predictions(open_store(cell.url), file_name("ood"))
    return found


def _finetuned(cell: Cell, work: FinetuneJob) -> _Found:
    job = work.model_copy(update={"release": cell.release, "seed": cell.seed})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = train(job, f"{cell.url}/{RUN}", console=Console(quiet=True), backend=OneProcess(device=device))
    subject = open_subject(result.url, None)
    predictor = Predictor(subject.exported.model, subject.release.schema, cell.passes, PREDICTION_SEED)
    predictions = {}
    for split in SPLITS:
        batches = map(subject.normaliser, evaluation_batches(subject.release, split, cell.batch_size))
        predictions[split] = predictor.predict(batches, split=split)
        check_coverage(predictions[split], subject.release.manifest.receipts[split])
    return _Found(predictions, result.steps, result.best_step)


def _baseline(cell: Cell, work: BaselineConfig) -> _Found:
    release = open_release(cell.release)
    train_examples, val = (read_examples(release, split, cell.batch_size).labelled() for split in ("train", "val"))
    model = work.fit(train_examples, val)
    predictions = {}
    for split in SPLITS:
        examples = read_examples(release, split, cell.batch_size)
        predictions[split] = predict_baseline(model, train_examples.label, examples, release, split)
        check_coverage(predictions[split], release.manifest.receipts[split])
    return _Found(predictions)


def _unusable(store: Store, found: str) -> DataError:
    remedy = "Remove the cell's folder and run the same command again."
    return DataError(explain(store.where(RESULT), expected="the result of this cell", found=found, remedy=remedy))
