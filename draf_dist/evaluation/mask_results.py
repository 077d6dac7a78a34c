"""What an evaluation of masks says of a split: means over studies with intervals, counts of all voxels, each study by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from draf_dist.evaluation.statistics import Estimate, Resamples, estimate_all
from draf_dist.evaluation.whole_masks import EVERYWHERE, ZONES, VolumeScore
from draf_dist.metrics.segmentation import ErrorDetection, Overlap
from draf_dist.schema.record import Record
from draf_dist.schema.release import Split
from draf_dist.training.mask_scores import UNCERTAINTIES, mean_defined

MEAN = "mean of structures"
# Shares of a zone's voxels that are kept, the most certain ones.
COVERAGES = (0.95, 0.9, 0.8, 0.5)
# What a number is of: "nll"; "dice" and a structure; a zone, what is measured, an uncertainty and so on.
Key = tuple[str, ...]


class PooledScores(Record):
    """Of all voxels of a split together: Dice by structure, and by uncertainty the AUROC of finding errors; null: undefined."""

    dice: dict[str, float | None]
    error_auroc: dict[str, float | None]


class ZoneScores(Record):
    """Of the voxels of one zone, see whole_masks.ZONES. num_voxels: of all studies together; everything else a mean over studies.

    error_rate: the share of wrong voxels. error_auroc: by uncertainty, the chance that a wrong voxel is the more uncertain one
    of a wrong and a right one. risk: by uncertainty, then by coverage: the share of wrong ones among the most certain voxels.
    """

    num_voxels: int
    error_rate: Estimate
    error_auroc: dict[str, Estimate]
    risk: dict[str, dict[str, Estimate]]


class MaskStudy(Record):
    """One study. dice: by structure; error_auroc: by zone, then by uncertainty; null: undefined."""

    uid: int
    nll: float
    dice: dict[str, float | None]
    error_auroc: dict[str, dict[str, float | None]]


class MaskSplit(Record):
    """One split. nll, dice (by structure) and what zones say: means over studies, with intervals over subjects.

    num_voxels: of which a mask says something. studies: each by itself.
    """

    split: Split
    num_studies: int
    num_voxels: int
    nll: Estimate
    dice: dict[str, Estimate]
    zones: dict[str, ZoneScores]
    pooled: PooledScores
    studies: tuple[MaskStudy, ...]


@dataclass(frozen=True)
class StudyNumbers:
    """One study: NaN is undefined."""

    uid: int
    numbers: Mapping[Key, float]

    @classmethod
    def of(cls, score: VolumeScore, structures: Sequence[str]) -> "StudyNumbers":
        """structures: without the background."""
        dice = score.study.overlap.dice[1:]
        found: dict[Key, float] = {("nll",): score.study.nll, ("dice", MEAN): mean_defined(dice)}
        found |= {("dice", name): value for name, value in zip(structures, dice.tolist(), strict=True)}
        for zone, errors in score.errors.items():
            found[zone, "error_rate"] = errors[UNCERTAINTIES[0]].risk(1)
            for name, one in errors.items():
                found[zone, "error_auroc", name] = one.auroc
                found |= {(zone, "risk", name, str(coverage)): one.risk(coverage) for coverage in COVERAGES}
        return cls(score.study.uid, found)

    def record(self, structures: Sequence[str]) -> MaskStudy:
        """What is written of it."""
        auroc = {zone: {name: _or_none(self.numbers[zone, "error_auroc", name]) for name in UNCERTAINTIES} for zone in ZONES}
        dice = {name: _or_none(self.numbers["dice", name]) for name in (MEAN, *structures)}
        return MaskStudy(uid=self.uid, nll=self.numbers["nll",], dice=dice, error_auroc=auroc)


@dataclass
class MaskCounts:
    """A split so far: numbers of every study, counts of all together. structures: without the background."""

    structures: Sequence[str]
    studies: list[StudyNumbers] = field(default_factory=list)
    overlap: Overlap | None = None
    errors: dict[str, dict[str, ErrorDetection]] = field(default_factory=lambda: {zone: {} for zone in ZONES})

    def add(self, score: VolumeScore) -> None:
        """One study more."""
        self.studies.append(StudyNumbers.of(score, self.structures))
        self.overlap = score.study.overlap if self.overlap is None else self.overlap + score.study.overlap
        for zone, found in score.errors.items():
            total = self.errors[zone]
            for name, one in found.items():
                total[name] = total[name] + one if name in total else one

    def result(self, split: Split, resamples: Resamples) -> MaskSplit:
        """All numbers of the split; resamples: of its studies, in the order in which they were added."""
        assert self.overlap is not None  # there is a study
        means = self._means(resamples)
        pooled = zip(self.structures, self.overlap.dice[1:].tolist(), strict=True)
        return MaskSplit(
            split=split,
            num_studies=len(self.studies),
            num_voxels=int(self.overlap.true.sum()),
            nll=means["nll",],
            dice={name: means["dice", name] for name in (MEAN, *self.structures)},
            zones={zone: _zone(zone, means, found[UNCERTAINTIES[0]].num_voxels) for zone, found in self.errors.items()},
            pooled=PooledScores(
                dice={name: _or_none(value) for name, value in pooled},
                error_auroc={name: _or_none(found.auroc) for name, found in self.errors[EVERYWHERE].items()},
            ),
            studies=tuple(study.record(self.structures) for study in self.studies),
        )

    def _means(self, resamples: Resamples) -> dict[Key, Estimate]:
        """Of every number, over the studies in which it is defined."""
        columns = {key: np.array([study.numbers[key] for study in self.studies]) for key in self.studies[0].numbers}
        found = estimate_all(lambda rows: {repr(key): mean_defined(values[rows]) for key, values in columns.items()}, resamples)
        return {key: found[repr(key)] for key in columns}


def _zone(zone: str, means: Mapping[Key, Estimate], num_voxels: int) -> ZoneScores:
    return ZoneScores(
        num_voxels=num_voxels,
        error_rate=means[zone, "error_rate"],
        error_auroc={name: means[zone, "error_auroc", name] for name in UNCERTAINTIES},
        risk={name: {str(kept): means[zone, "risk", name, str(kept)] for kept in COVERAGES} for name in UNCERTAINTIES},
    )


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value
