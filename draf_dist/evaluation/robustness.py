"""The robustness sweep: one corruption at one severity at a time, and modalities removed, against the same studies clean."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from draf_dist.data.corruption import AnyOperation, Missing, MissingNotAtRandom, Swap, severity
from draf_dist.data.corruption.missing import with_present
from draf_dist.evaluation.compare import Reference, compare
from draf_dist.evaluation.context import Context
from draf_dist.evaluation.describe import masked_means, mean_reliability
from draf_dist.evaluation.describe_classes import describe_regret
from draf_dist.evaluation.job import SweepSettings
from draf_dist.evaluation.parts import REMOVALS, Condition
from draf_dist.evaluation.predictions import ALL, CLEAN, Applied, Predictions
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


def cases_of(operation: AnyOperation, schema: DataSchema) -> list[Case]:
    """Every non-zero grid entry, on every modality that it fits and, where it fits several, on all of them."""
    return [Case(operation, index, modality) for modality in _scopes(operation, schema) for index in range(1, len(operation.grid))]


def removals(schema: DataSchema) -> list[tuple[str, str, torch.Tensor]]:
    """(remove | only, modality, bool (M,): which modalities stay): without each modality, and each alone."""
    found = []
    for m, name in enumerate(schema.names):
        alone = torch.arange(len(schema.names)) == m
        found += [(REMOVE, name, ~alone), (ONLY, name, alone)]
    return found


def kept(batches: Iterable[Batch], keep: torch.Tensor) -> Iterator[Batch]:
    """Studies that have something to lose and something to keep, with only `keep` left."""
    for batch in batches:
        here = keep.to(batch.present.device)
        rows = (batch.present & here).any(1) & (batch.present & ~here).any(1)
        if rows.any():
            part = batch.map(lambda tensor: tensor[rows])  # noqa: B023
            yield with_present(part, part.present & here)


def describe_sweep(
    found: Mapping[Condition, Mapping[Applied, Predictions]], settings: SweepSettings, schema: DataSchema, context: Context
) -> SweepRun:
    """What predictions amount to, CLEAN being the same studies clean. What was not possible is not there."""
    clean = found[CLEAN][Applied()]
    reference = Reference(clean.labelled(), context)
    cases = {operation: cases_of(operation, schema) for operation in settings.operations}
    todo = [case for operation in settings.operations for case in cases[operation] if case.applied in found[operation]]
    corrupted = [found[case.operation][case.applied] for case in todo]
    applied = (Applied(kind, 1, modality) for kind, modality, _ in removals(schema))
    removed = [found[REMOVALS][one] for one in applied if one in found[REMOVALS]]
    result = Sweep(
        split=settings.split,
        passes=settings.passes,
        num_studies=reference.predictions.num_studies,
        clean=reference.estimates(),
        clean_reliability=mean_reliability(clean),
        cells=tuple(_cell(reference, part, case) for part, case in zip(corrupted, todo, strict=True)),
        removals=tuple(_removal(reference, part) for part in removed),
        left_out=tuple(operation.kind for operation in settings.operations if cases[operation] and not found[operation]),
    )
    return SweepRun(result, clean, tuple(corrupted), tuple(removed))


def _cell(reference: Reference, corrupted: Predictions, case: Case) -> Cell:
    level = f"{case.operation.grid[case.index]:g}"
    return _described(reference, corrupted, level, severity(case.operation, case.index))


def _removal(reference: Reference, removed: Predictions) -> Cell:
    # Both sides on the studies that have something to lose: the others would only dilute the difference.
    context = reference.context
    part = Reference(reference.predictions.rows(np.isin(reference.predictions.uid, removed.uid)), context)
    cell, known = _described(part, removed, "", 1.0), removed.labelled()
    return cell.model_copy(update={"regret": describe_regret(known, context, context.resamples_of_group(known))})


def _described(reference: Reference, corrupted: Predictions, level: str, severity_: float) -> Cell:
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


def _scopes(operation: AnyOperation, schema: DataSchema) -> list[str | None]:
    if isinstance(operation, Missing | MissingNotAtRandom):
        return [None]
    if isinstance(operation, Swap):
        return list(schema.names)
    fitting: list[str | None] = [spec.name for spec in schema.modalities if operation.fits(spec)]
    return [*fitting, None] if len(fitting) > 1 else fitting
