"""The robustness sweep: one corruption at one severity at a time, and modalities removed, against the same studies clean."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from draf_dist.data.bad_data import STRICT, BadData
from draf_dist.data.corruption import AnyOperation, Corruptor, Missing, MissingNotAtRandom, Swap, corrupted_batches, severity
from draf_dist.data.corruption.missing import with_present
from draf_dist.data.loader import evaluation_batches
from draf_dist.data.release import Release
from draf_dist.evaluation.compare import Reference, compare
from draf_dist.evaluation.describe import Context, describe_regret, masked_means, mean_reliability
from draf_dist.evaluation.job import SweepSettings
from draf_dist.evaluation.predict import Predictor
from draf_dist.evaluation.predictions import ALL, Applied, Predictions
from draf_dist.evaluation.results import Cell, Sweep
from draf_dist.schema.batch import Batch
from draf_dist.schema.modality import DataSchema

REMOVE, ONLY = "remove", "only"


@dataclass(frozen=True)
class Case:
    """One cell to come: an operation at a grid index on one modality, or on all that it fits (None)."""

    operation: AnyOperation
    index: int
    modality: str | None

    @property
    def applied(self) -> Applied:
        """As it is stored."""
        return Applied(self.operation.kind, self.index, self.modality or ALL)


@dataclass(frozen=True)
class SweepRun:
    """The sweep of one model on one split: predictions by cell, clean ones first, and what they amount to."""

    result: Sweep
    clean: Predictions
    corrupted: tuple[Predictions, ...]
    removed: tuple[Predictions, ...]


def cases(settings: SweepSettings, schema: DataSchema) -> list[Case]:
    """Every operation at every non-zero grid entry, on every modality it fits and, where it fits several, on all of them."""
    return [
        Case(operation, index, modality)
        for operation in settings.operations
        for modality in _scopes(operation, schema)
        for index in range(1, len(operation.grid))
    ]


class Sweeper:
    """Predicts and compares; holds the clean studies of the split, normalised, in memory (at most `max_studies` of them)."""

    def __init__(
        self,
        release: Release,
        corruptor: Corruptor,
        predictor: Predictor,
        context: Context,
        settings: SweepSettings,
        bad_data: BadData = STRICT,
    ) -> None:
        self.release, self.corruptor, self.predictor, self.context, self.settings = release, corruptor, predictor, context, settings
        self.bad_data = bad_data
        batches = evaluation_batches(release, settings.split, context.job.batch_size, bad_data=bad_data)
        clean = list(map(corruptor.normaliser, batches))
        self._left_out = _impossible(settings.operations, clean)
        self._chosen = _smallest_uids(clean, settings.max_studies)
        self._clean = list(self._only_chosen(clean))

    def run(self, on_cell: Callable[[int, int], None]) -> SweepRun:
        """All cells; on_cell(done, total) is called after each."""
        todo = [case for case in cases(self.settings, self.predictor.schema) if case.operation.kind not in self._left_out]
        removals = self._removals()
        total = len(todo) + len(removals)
        clean = self._predict(self._clean, Applied())
        reference = Reference(clean.labelled(), self.context)
        corrupted = []
        for case in todo:
            corrupted.append(self._predict(self._batches(case), case.applied))
            on_cell(len(corrupted), total)
        removed = []
        for kind, modality, keep in removals:
            removed.append(self._predict(self._kept(keep), Applied(kind, 1, modality)))
            on_cell(len(corrupted) + len(removed), total)
        result = Sweep(
            split=self.settings.split,
            passes=self.settings.passes,
            num_studies=reference.predictions.num_studies,
            clean=reference.estimates(),
            clean_reliability=mean_reliability(clean),
            cells=tuple(self._cell(reference, part, case) for part, case in zip(corrupted, todo, strict=True)),
            removals=tuple(self._removal(reference, part) for part in removed),
            left_out=self._left_out,
        )
        return SweepRun(result, clean, tuple(corrupted), tuple(removed))

    def _predict(self, batches: Sequence[Batch] | Iterator[Batch], applied: Applied) -> Predictions:
        return self.predictor.predict(batches, split=self.settings.split, applied=applied)

    def _batches(self, case: Case) -> Iterator[Batch]:
        operation, seed = case.operation, self.context.job.seed
        if isinstance(operation, Swap | MissingNotAtRandom):
            # These need the whole split: partners, and how sick everybody is.
            size = self.context.job.batch_size
            found = corrupted_batches(
                self.release,
                self.settings.split,
                self.corruptor,
                operation,
                case.index,
                modality=case.modality,
                seed=seed,
                batch_size=size,
                bad_data=self.bad_data,
            )
            return self._only_chosen(found)
        return (self.corruptor.apply(batch, operation, case.index, modality=case.modality, seed=seed) for batch in self._clean)

    def _only_chosen(self, batches: Sequence[Batch] | Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            rows = torch.isin(batch.uid, self._chosen)
            if rows.any():
                yield _rows(batch, rows)

    def _removals(self) -> list[tuple[str, str, torch.Tensor]]:
        """(remove | only, modality, which modalities stay): without each modality, and each alone, where someone has both kinds."""
        present = torch.cat([batch.present for batch in self._clean])
        found = []
        for m, name in enumerate(self.predictor.schema.names):
            alone = torch.arange(present.shape[1]) == m
            if (present[:, m] & (present.sum(1) > 1)).any():
                found += [(REMOVE, name, ~alone), (ONLY, name, alone)]
        return found

    def _kept(self, keep: torch.Tensor) -> Iterator[Batch]:
        """Studies that have something to lose and something to keep, with only `keep` left."""
        for batch in self._clean:
            rows = (batch.present & keep).any(1) & (batch.present & ~keep).any(1)
            if rows.any():
                part = _rows(batch, rows)
                yield with_present(part, part.present & keep)

    def _cell(self, reference: Reference, corrupted: Predictions, case: Case) -> Cell:
        level = f"{case.operation.grid[case.index]:g}"
        return self._described(reference, corrupted, level, severity(case.operation, case.index))

    def _removal(self, reference: Reference, removed: Predictions) -> Cell:
        # Both sides on the studies that have something to lose: the others would only dilute the difference.
        kept = np.isin(reference.predictions.uid, removed.uid)
        part = Reference(reference.predictions.rows(kept), self.context)
        cell = self._described(part, removed, "", 1.0)
        known = removed.labelled()
        return cell.model_copy(update={"regret": describe_regret(known, self.context, self.context.resamples(known))})

    def _described(self, reference: Reference, corrupted: Predictions, level: str, severity_: float) -> Cell:
        known = corrupted.labelled()
        return Cell(
            operation=corrupted.applied.operation,
            index=corrupted.applied.index,
            level=level,
            severity=severity_,
            modality=corrupted.applied.modality,
            num_studies=known.num_studies,
            metrics=compare(reference, known),
            reliability=mean_reliability(known),
            corruption_probability=masked_means(known, known.corruption_probability),
        )


def _impossible(operations: Sequence[AnyOperation], clean: Sequence[Batch]) -> tuple[str, ...]:
    """Operations that ask who is sicker, on a small split where all have one label."""
    labels = {label for batch in clean for label in batch.target.label[batch.weight > 0].tolist()}
    asking = [part.kind for part in operations if isinstance(part, MissingNotAtRandom) and part.score == "label"]
    return tuple(asking) if len(labels) < 2 else ()


def _scopes(operation: AnyOperation, schema: DataSchema) -> list[str | None]:
    if isinstance(operation, Missing | MissingNotAtRandom):
        return [None]
    if isinstance(operation, Swap):
        return list(schema.names)
    fitting: list[str | None] = [spec.name for spec in schema.modalities if operation.fits(spec)]
    return [*fitting, None] if len(fitting) > 1 else fitting


def _rows(batch: Batch, rows: torch.Tensor) -> Batch:
    return batch.map(lambda tensor: tensor[rows])


def _smallest_uids(batches: Sequence[Batch], count: int) -> torch.Tensor:
    return torch.cat([batch.uid for batch in batches]).sort().values[:count]
