"""A benchmark on studies of which more is missing the sicker they are: in training, validation and the fold held out alike."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from draf_dist.config.spec import Spec, fingerprint
from draf_dist.data.corruption.missing import find_offset
from draf_dist.errors import DataError, SpecError, explain
from draf_dist.noise import chain, uniform
from draf_dist.schema.modality import DataSchema, SeriesSpec, TableSpec
from draf_dist.schema.study import MaskLabel, Rejection, Study, StudyLabel, TimeToEvent
from draf_dist.sources.base import Source, SourceCounts

ValueT = TypeVar("ValueT")
Floats = NDArray[np.float64]
KEY = "missing_from_start"


class MissingFromStart(Spec):
    """logit P(a study never had modality m) = a_m + slope s, s its standardised severity (spec 0.4); a_m so that the mean is rate.

    score is what the severity is: the first principal score of series and tables, or the label. The slope is per standard
    deviation: of a label that p of the studies have it sets classes slope / sqrt(p (1 - p)) logits apart. A study that has
    modalities keeps one, drawn at random, so what is lost in the end is less. The law is fitted to all studies of the export;
    given it, what a study loses is a function of (seed, subject, site, anchor) and its severity, the same in every fold.
    """

    rate: float = Field(gt=0, lt=1)
    slope: float = Field(1.0, ge=-20, le=20)
    score: Literal["ehr", "label"] = "ehr"
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class Axis:
    """The first principal axis of an export's numbers. mean, std: (F,) of what is observed; direction: (F,) of unit length.

    Its sign is that which goes with the label.
    """

    mean: Floats
    std: Floats
    direction: Floats

    @classmethod
    def of(cls, records: Floats, label: Floats) -> "Axis":
        """Of records (n, F), NaN where not observed, and labels (n,)."""
        observed = np.isfinite(records)
        count = np.maximum(observed.sum(0), 1)
        mean = np.where(observed, records, 0.0).sum(0) / count
        std = np.sqrt((np.where(observed, records - mean, 0.0) ** 2).sum(0) / count)
        std[std == 0] = 1.0
        standard = np.where(observed, (records - mean) / std, 0.0)
        centred = standard - standard.mean(0)
        direction: Floats = np.linalg.eigh(centred.T @ centred)[1][:, -1]
        along = (centred @ direction) @ (label - label.mean())
        return cls(mean, std, direction if along >= 0 else -direction)

    def score(self, record: Floats) -> float:
        """Of one record (F,); what is not observed counts as the mean."""
        standard = np.where(np.isfinite(record), (record - self.mean) / self.std, 0.0)
        return float(standard @ self.direction)


@dataclass(frozen=True)
class LossLaw:
    """Fitted to an export. offsets: a_m by modality; mean, std: of the severity; axis: None where that is the label."""

    schema: DataSchema
    offsets: dict[str, float]
    slope: float
    mean: float
    std: float
    axis: Axis | None

    def severity(self, study: Study) -> float:
        """Standardised."""
        raw = _sickness(study.label) if self.axis is None else self.axis.score(_record(self.schema, study))
        return (raw - self.mean) / self.std

    def probability(self, modality: str, severity: float) -> float:
        """P(the modality is lost), before one is kept."""
        return float(torch.sigmoid(torch.tensor(self.offsets[modality] + self.slope * severity, dtype=torch.float64)))


def fit_loss(source: Source, missing: MissingFromStart) -> LossLaw:
    """By one pass over the export.

    Raises:
        SpecError: the label is a mask; by `score: ehr`, there are no numbers.
        DataError: no study; all studies are equally sick.
    """
    schema, studies = source.schema, [study for study in source.studies() if isinstance(study, Study)]
    if not studies:
        raise DataError(explain(KEY, expected="studies to fit its law to", found="none", remedy="Check --raw and the card."))
    raw = np.array([_sickness(study.label) for study in studies])
    axis = None
    if missing.score == "ehr":
        _check_numbers(schema)
        records = np.stack([_record(schema, study) for study in studies])
        axis = Axis.of(records, raw)
        raw = np.array([axis.score(record) for record in records])
    mean, std = float(raw.mean()), float(raw.std())
    if not std > 0:
        found, remedy = f"the same for all {len(raw)} studies", "Take the other `score`, or leave it out."
        raise DataError(explain(f"{KEY}: score {missing.score}", expected="a severity that varies", found=found, remedy=remedy))
    standard = torch.from_numpy((raw - mean) / std)
    held = [_modalities(study) for study in studies]
    offsets = {
        name: find_offset(standard[torch.tensor([name in own for own in held])], rate=missing.rate, slope=missing.slope)
        for name in schema.names
    }
    return LossLaw(schema, offsets, missing.slope, mean, std, axis)


class MissingSource:
    """A source without what its studies lost by a law that was fitted to them."""

    def __init__(self, inner: Source, missing: MissingFromStart, law: LossLaw) -> None:
        self._inner, self._seed, self._law = inner, missing.seed, law
        self.name, self.schema, self.held_out_sites = inner.name, inner.schema, inner.held_out_sites
        self.public_subject_key = inner.public_subject_key
        # Its releases are not those of the card alone.
        self.card_sha256 = fingerprint({"card": inner.card_sha256, KEY: missing.model_dump()})
        self.counts = SourceCounts()

    def studies(self) -> Iterator[Study | Rejection]:
        """As of a source."""
        for study in self._inner.studies():
            yield self._left(study) if isinstance(study, Study) else study
        self.counts = self._inner.counts

    def _left(self, study: Study) -> Study:
        held, severity = _modalities(study), self._law.severity(study)
        names = [name for name in self.schema.names if name in held]
        lost = {name for name in names if self._draw("lost", name, study) < self._law.probability(name, severity)}
        if names and len(lost) == len(names):
            # Drawn apart: the largest of the first draws would favour what is lost more often.
            lost.remove(max(names, key=lambda name: self._draw("kept", name, study)))
        return replace(
            study,
            inputs=_without(study.inputs, lost),
            volumes=_without(study.volumes, lost),
            image_digests=_without(study.image_digests, lost),
            quality=_without(study.quality, lost),
        )

    def _draw(self, purpose: str, modality: str, study: Study) -> float:
        key = chain(self._seed, KEY, purpose, modality, study.subject, study.site, study.anchor)
        return float(uniform(torch.tensor([key]), (1,)))


def _without(parts: Mapping[str, ValueT], lost: set[str]) -> dict[str, ValueT]:
    return {name: value for name, value in parts.items() if name not in lost}


def _modalities(study: Study) -> set[str]:
    """What a release will hold of it: an array of which nothing was observed is absent there."""
    observed = {name for name, value in study.inputs.items() if value.dtype == np.uint8 or np.isfinite(value).any()}
    return {*observed, *study.volumes}


def _numeric(schema: DataSchema) -> list[tuple[str, list[int]]]:
    """Series and tables with the columns that are no codes."""
    return [
        (spec.name, [at for at, variable in enumerate(spec.variables) if variable.type != "categorical"])
        for spec in schema.modalities
        if isinstance(spec, SeriesSpec | TableSpec)
    ]


def _record(schema: DataSchema, study: Study) -> Floats:
    """Means over observed steps of all variables of series and tables, (F,), NaN where nothing was observed."""
    parts = []
    for name, columns in _numeric(schema):
        values = study.inputs.get(name)
        steps = np.full((1, len(columns)), np.nan) if values is None else values[:, columns].astype(np.float64)
        count = np.isfinite(steps).sum(0)
        total = np.where(np.isfinite(steps), steps, 0.0).sum(0)
        parts.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    return np.concatenate(parts)


def _check_numbers(schema: DataSchema) -> None:
    if not any(columns for _, columns in _numeric(schema)):
        remedy = "Take `score: label`."
        raise SpecError(explain(f"{KEY}: score ehr", expected="series or tables of numbers", found="none", remedy=remedy))


def _sickness(label: StudyLabel) -> float:
    """How sick a study counts as by its label: class index; number of labels known to hold; whether the event was seen."""
    match label:
        case MaskLabel():
            found, remedy = "a mask", "Leave it out."
            raise SpecError(explain(KEY, expected="a label that says how sick", found=found, remedy=remedy))
        case TimeToEvent():
            return float(label.event)
        case tuple():
            return float(sum(answer is True for answer in label))
        case _:
            return float(label)
