"""What can be done to inputs at test alone: trained networks of the reference predict studies that are treated first."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from findings_sites import REJECTION, over_folds, severity_of
from findings_study import AS_THEY_ARE, Study, Where, trained
from findings_tables import Table, Tables, comparison_tables
from torch import Tensor

from draf_dist.data.loader import evaluation_batches
from draf_dist.evaluation.bench import result_of
from draf_dist.evaluation.bench_cell import PREDICTION_SEED, Cell
from draf_dist.evaluation.bench_conditions import Disturbed
from draf_dist.evaluation.bench_disturbed import Comparison
from draf_dist.evaluation.bench_scores import Pooled
from draf_dist.evaluation.predict import Predictor
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.scoring import temperature_of
from draf_dist.evaluation.subject import Subject
from draf_dist.metrics.temperature import Temperature
from draf_dist.models.fusion.severity_rejection import keep
from draf_dist.models.severity import Severity
from draf_dist.schema.batch import Batch, SeriesInput
from draf_dist.schema.modality import DataSchema, SeriesSpec, TableSpec
from draf_dist.schema.release import Split

CONDITIONS = ("sigma_10", "half_sigma_3", "sign_flip", "unit_error")
LARGEST, CLAMPED, FORGOTTEN = 6.0, 4.0, 6.0
Treatment = Callable[[Batch], Batch]


def reject(severity: Severity, largest: float) -> Treatment:
    """A modality whose sigma_hat is above `largest` is missing; one at least is kept."""
    return lambda batch: replace(batch, present=keep(batch.present, severity(batch), float(np.log1p(largest))))


def clamp(schema: DataSchema, largest: float) -> Treatment:
    """Standardised numbers of tables and series are at most `largest` away from 0."""

    def of(value: SeriesInput, numeric: Tensor) -> SeriesInput:
        return replace(value, values=torch.where(numeric, value.values.clamp(-largest, largest), value.values))

    return lambda batch: _each_input(schema, batch, of)


def forget(schema: DataSchema, largest: float) -> Treatment:
    """Standardised numbers that are further away from 0 were not observed; a modality of which nothing is left is missing.

    One modality at least is kept: a study that would lose all has them with nothing observed.
    """

    def of(value: SeriesInput, numeric: Tensor) -> SeriesInput:
        known = value.observed & (~numeric | (value.values.abs() <= largest))
        return replace(value, values=torch.where(known, value.values, 0.0), observed=known)

    def treatment(batch: Batch) -> Batch:
        found = _each_input(schema, batch, of)
        left = batch.present & (_measured(found) | ~_measured(batch))
        return replace(found, present=torch.where(left.any(1, keepdim=True), left, batch.present))

    return treatment


def _each_input(schema: DataSchema, batch: Batch, change: Callable[[SeriesInput, Tensor], SeriesInput]) -> Batch:
    """The tables and series changed; of the variables, bool (F,), those that are numbers: binary ones and codes have no scale."""
    found = dict(batch.inputs)
    for spec in schema.modalities:
        value = found[spec.name]
        if isinstance(spec, SeriesSpec | TableSpec) and isinstance(value, SeriesInput):
            found[spec.name] = change(value, torch.tensor([variable.type == "numeric" for variable in spec.variables]))
    return replace(batch, inputs=found)


def _measured(batch: Batch) -> Tensor:
    """Bool (B, M): something of the modality was observed; of images always."""
    inputs, everyone = (batch.inputs[name] for name in batch.modalities), torch.ones(batch.num_rows, dtype=torch.bool)
    columns = [value.observed.flatten(1).any(1) if isinstance(value, SeriesInput) else everyone for value in inputs]
    return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Model:
    """The reference's network of one fold, and the severity of the same fold."""

    cell: Cell
    severity: Severity

    @cached_property
    def subject(self) -> Subject:
        """The network with its release."""
        return trained(self.cell)

    @cached_property
    def disturbed(self) -> Disturbed:
        """The fold, held in memory."""
        return Disturbed(self.subject.release, "ood", self.subject.normaliser, self.cell.batch_size, seed=PREDICTION_SEED)

    @property
    def treatments(self) -> dict[str, Treatment]:
        """By name."""
        schema = self.subject.release.schema
        return {
            f"reject where sigma_hat > {LARGEST:g}": reject(self.severity, LARGEST),
            f"clamp values to +-{CLAMPED:g}": clamp(schema, CLAMPED),
            f"forget values beyond +-{FORGOTTEN:g}": forget(schema, FORGOTTEN),
        }

    def validation(self, treatment: Treatment) -> Temperature:
        """The temperature of treated validation studies."""
        batches = evaluation_batches(self.subject.release, "val", self.cell.batch_size)
        return temperature_of(self._predict(map(treatment, map(self.subject.normaliser, batches)), "val"))

    def places(self) -> Iterable[tuple[Where, list[Batch]]]:
        """The fold clean and under every condition, case by case."""
        subject = self.subject
        yield AS_THEY_ARE, [subject.normaliser(one) for one in evaluation_batches(subject.release, "ood", self.cell.batch_size)]
        for name in CONDITIONS:
            for applied, batches in self.disturbed.under(dict(self.cell.conditions)[name]):
                yield (name, applied.modality), list(batches)

    def predict(self, batches: Iterable[Batch], treatment: Treatment) -> Predictions:
        """Of treated studies of the fold."""
        return self._predict(map(treatment, batches), "ood")

    def _predict(self, batches: Iterable[Batch], split: Split) -> Predictions:
        predictor = Predictor(self.subject.exported.model, self.subject.release.schema, self.cell.passes, PREDICTION_SEED)
        return predictor.predict(batches, split=split)


@dataclass(frozen=True)
class Treated:
    """What the reference's networks of one seed say of studies under one treatment: by place, of every fold."""

    temperatures: list[Temperature]
    parts: dict[Where, list[Predictions]]


def treatment_tables(study: Study) -> Tables:
    """Differences to the same networks without treatment, by condition and by the modality that it hits; Holm over the treatments.

    The temperature is that of validation studies treated alike.
    """
    severities = [severity_of(cell) for cell in study.cells(REJECTION, study.seeds[0])]
    reference = study.prepared.job.reference
    by_seed = [
        _of_seed([Model(cell, one) for cell, one in zip(study.cells(reference, seed), severities, strict=True)])
        for seed in study.seeds
    ]
    names, places = list(by_seed[0]), list(by_seed[0][next(iter(by_seed[0]))].parts)
    comparison = Comparison(study.resamples, reference, study.prepared.job.bootstrap_seed)

    def read(where: list[Where]) -> Callable[[str], list[list[Pooled]]]:
        def of(system: str) -> list[list[Pooled]]:
            if system == reference:
                return [[study.pooled(reference, seed, one) for one in where] for seed in study.seeds]
            pairs = zip(study.seeds, by_seed, strict=True)
            return [[_pooled(study, seed, found[system], one) for one in where] for seed, found in pairs]

        return of

    systems = [reference, *names]
    results = [
        comparison.compare(title, [case for _, case in where], systems, read(where), exact=None)
        for title, where in _columns(places).items()
    ]
    tables = {f"At test alone: {title}": one for title, one in comparison_tables(results).items()}
    return tables | {f"Share with sigma_hat above {LARGEST:g}, of the studies whose modality is hit": _above(study, severities)}


def _of_seed(models: list[Model]) -> dict[str, Treated]:
    """Treatment -> what the models of all folds say."""
    found: dict[str, Treated] = {}
    for model in models:
        places = dict(model.places())
        for name, treatment in model.treatments.items():
            treated = found.setdefault(name, Treated([], {}))
            treated.temperatures.append(model.validation(treatment))
            for where, batches in places.items():
                treated.parts.setdefault(where, []).append(model.predict(batches, treatment))
    return found


def _pooled(study: Study, seed: int, treated: Treated, where: Where) -> Pooled:
    cells = zip(study.cells(study.prepared.job.reference, seed), treated.temperatures, strict=True)
    pairs = [(cell, result_of(cell).model_copy(update={"temperature": temperature})) for cell, temperature in cells]
    return study.counted.pool(pairs, treated.parts[where])


def _columns(places: list[Where]) -> dict[str, list[Where]]:
    """Condition -> its cases; and each of several cases alone."""
    found: dict[str, list[Where]] = {}
    for name, case in places:
        found.setdefault(name, []).append((name, case))
    alone = {f"{name}, {case}": [(name, case)] for name, case in places if len(found[name]) > 1}
    return found | alone


@torch.no_grad()
def _above(study: Study, severities: list[Severity]) -> Table:
    """Condition and modality -> share of the studies with sigma_hat above the largest: mean, least and greatest of folds.

    Where a study has no other modality below it, the least severe is kept all the same.
    """
    shares: dict[str, list[float]] = {}
    cells = study.cells(study.prepared.job.reference, study.seeds[0])
    for cell, severity in zip(cells, severities, strict=True):
        for (name, case), batches in Model(cell, severity).places():
            if case in study.schema.names:
                m = study.schema.names.index(case)
                hit = torch.cat([severity(batch)[:, m][batch.corrupted[:, m]] for batch in batches])
                shares.setdefault(f"{name}, {case}", []).append(float((hit > np.log1p(LARGEST)).float().mean()))
    return {name: over_folds(each) for name, each in shares.items()}
