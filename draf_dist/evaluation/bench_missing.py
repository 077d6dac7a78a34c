"""A benchmark on studies of which more is missing the sicker they are: in training, validation and the fold held out alike."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from pydantic import Field

from draf_dist.config.spec import Spec, fingerprint
from draf_dist.data.corruption.missing import constant_severity, find_offset
from draf_dist.errors import SpecError, explain
from draf_dist.noise import chain, uniform
from draf_dist.schema.study import MaskLabel, Rejection, Study, StudyLabel, TimeToEvent
from draf_dist.sources.base import Source, SourceCounts

ValueT = TypeVar("ValueT")


class MissingByLabel(Spec):
    """logit P(a study never had modality m) = a_m + slope s, s its standardised label (spec 0.4); a_m so that the mean is rate.

    A study that has modalities keeps one, drawn at random. Which are lost is a function of (seed, subject, site, anchor), so a
    study loses the same in every fold. seed: another one gives another pattern.
    """

    rate: float = Field(gt=0, lt=1)
    slope: float = 1.0
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class LossLaw:
    """Fitted to an export. offsets: a_m by modality; mean, std: of the labels."""

    offsets: dict[str, float]
    slope: float
    mean: float
    std: float

    def probability(self, modality: str, label: StudyLabel) -> float:
        """P(the modality is lost), before one is kept."""
        logit = self.offsets[modality] + self.slope * (_score(label) - self.mean) / self.std
        return float(torch.sigmoid(torch.tensor(logit, dtype=torch.float64)))


class MissingSource:
    """A source without what its studies lost. The export is read once more, for the law."""

    def __init__(self, inner: Source, missing: MissingByLabel) -> None:
        self._inner, self._missing = inner, missing
        self.name, self.schema, self.held_out_sites = inner.name, inner.schema, inner.held_out_sites
        self.public_subject_key = inner.public_subject_key
        # Its releases are not those of the card alone.
        self.card_sha256 = fingerprint({"card": inner.card_sha256, "missing_by_label": missing.model_dump()})
        self.counts = SourceCounts()

    def studies(self) -> Iterator[Study | Rejection]:
        """As of a source."""
        law = self.law
        for study in self._inner.studies():
            yield self._left(study, law) if isinstance(study, Study) else study
        self.counts = self._inner.counts

    @cached_property
    def law(self) -> LossLaw:
        """By one pass over the export.

        Raises:
            SpecError: the label is a mask.
            DataError: all studies have one label.
        """
        found = [(_score(study.label), _modalities(study)) for study in self._inner.studies() if isinstance(study, Study)]
        score = torch.tensor([label for label, _ in found], dtype=torch.float64)
        if not found or not float(score.std(correction=0)) > 0:
            raise constant_severity("label", len(found))
        mean, std = float(score.mean()), float(score.std(correction=0))
        present = {name: torch.tensor([name in names for _, names in found]) for name in self.schema.names}
        missing = self._missing
        offsets = {
            name: find_offset((score[has] - mean) / std, rate=missing.rate, slope=missing.slope) for name, has in present.items()
        }
        return LossLaw(offsets, missing.slope, mean, std)

    def _left(self, study: Study, law: LossLaw) -> Study:
        names = [name for name in self.schema.names if name in _modalities(study)]
        lost = {name for name in names if self._draw("lost", name, study) < law.probability(name, study.label)}
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
        key = chain(self._missing.seed, "missing_by_label", purpose, modality, study.subject, study.site, study.anchor)
        return float(uniform(torch.tensor([key]), (1,)))


def _without(parts: Mapping[str, ValueT], lost: set[str]) -> dict[str, ValueT]:
    return {name: value for name, value in parts.items() if name not in lost}


def _modalities(study: Study) -> set[str]:
    return {*study.inputs, *study.volumes}


def _score(label: StudyLabel) -> float:
    """How sick a study counts as: class index; number of labels known to hold; whether the event was seen."""
    match label:
        case MaskLabel():
            found, remedy = "a mask", "Leave it out."
            raise SpecError(explain("missing_by_label", expected="a label that says how sick", found=found, remedy=remedy))
        case TimeToEvent():
            return float(label.event)
        case tuple():
            return float(sum(answer is True for answer in label))
        case _:
            return float(label)
