"""The evaluation of a model of masks: Dice by structure, and whether its uncertainty finds its errors, with intervals.

Whole volumes, in tiles of the patches that the model was trained on. Passes are streamed: of a voxel nothing is kept but three
sums, of a study its counts.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.data.release import Release
from draf_dist.data.whole_volumes import whole_volumes
from draf_dist.errors import DataError, explain
from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.statistics import Estimate, Resamples, estimate_all
from draf_dist.evaluation.subject import Subject, open_subject
from draf_dist.evaluation.whole_masks import predicted_tiles, volume_score
from draf_dist.metrics.segmentation import ErrorDetection, Overlap
from draf_dist.models.link import link_of
from draf_dist.models.segmentation import BayesianUnet, BayesianUnetConfig
from draf_dist.models.variational import weight_keys
from draf_dist.schema.batch import Batch
from draf_dist.schema.label import SegmentationSpec
from draf_dist.schema.modality import ImageSpec
from draf_dist.schema.record import Record
from draf_dist.schema.release import Split
from draf_dist.training.job import FinetuneJob
from draf_dist.training.mask_scores import UNCERTAINTIES, StudyScore, mean_defined
from draf_dist.training.run_folder import open_run

RESULTS = "masks.json"
MEAN = "mean of structures"
# That of other predictions: with the same seed and passes as validation, the same numbers come out.
STREAM = "mc"
# Of a volume at once; no number depends on it.
TILES_AT_ONCE = 4


class PooledScores(Record):
    """Of all voxels of a split together: Dice by structure, and by uncertainty the AUROC of finding errors; null: undefined."""

    dice: dict[str, float | None]
    error_auroc: dict[str, float | None]


class MaskSplit(Record):
    """One split. nll, dice (by structure), error_auroc (by uncertainty): means over studies, with intervals over subjects.

    num_voxels: of which a mask says something.
    """

    split: Split
    num_studies: int
    num_voxels: int
    nll: Estimate
    dice: dict[str, Estimate]
    error_auroc: dict[str, Estimate]
    pooled: PooledScores


class MaskEvaluation(Record):
    """masks.json of a run. overlap: voxels that neighbouring tiles of a volume share at least."""

    release: str
    model_sha256: str
    passes: int
    overlap: int
    splits: tuple[MaskSplit, ...]


def evaluate_masks(run_url: str, job: EvaluateJob, device: str = "cpu", *, release_url: str | None = None) -> MaskEvaluation | None:
    """Measures the splits of the job and writes masks.json into the run folder; None where the label is no mask.

    release_url: another release to measure on; then nothing is written, for the run's folder speaks of its own.

    Raises:
        SpecError: there is no run or release, or no exported model yet.
        DataError: the model can't read the release, files are damaged, or no split has a mask.
    """
    trained = open_run(run_url).job
    if not isinstance(trained, FinetuneJob) or not isinstance(trained.model, BayesianUnetConfig):
        return None
    subject = open_subject(run_url, release_url)
    label, model = subject.release.schema.label, subject.exported.model
    if not isinstance(label, SegmentationSpec) or not isinstance(model, BayesianUnet):
        return None
    measured = _Measure(subject, model.to(device).eval(), job, torch.device(device), _overlap(model, subject.release))
    splits = tuple(split for name in job.splits if (split := measured.split(name)) is not None)
    if not splits:
        found = f"none in {', '.join(job.splits)}"
        raise DataError(explain("masks", expected="studies with a mask", found=found, remedy="Prepare more data."))
    result = MaskEvaluation(
        release=subject.release.pinned_url,
        model_sha256=subject.model_sha256,
        passes=job.passes,
        overlap=measured.overlap,
        splits=splits,
    )
    if release_url is None:
        subject.run.store.write(RESULTS, (json.dumps(result.model_dump(mode="json"), indent=1, allow_nan=False) + "\n").encode())
    return result


@dataclass(frozen=True)
class _Measure:
    """What all splits have in common."""

    subject: Subject
    model: BayesianUnet
    job: EvaluateJob
    device: torch.device
    overlap: int

    def split(self, name: Split) -> MaskSplit | None:
        """None where no study has a mask."""
        task = self.model.tasks[self.model.label]
        found = _Found([], [], None, {})
        for volume in whole_volumes(self.subject.release, name, overlap=self.overlap):
            if volume.mask is not None:
                tiles = predicted_tiles(volume, self._passes, link_of(task), TILES_AT_ONCE)
                found.add(volume_score(volume, tiles, len(task.outputs)))
        return found.result(name, task.outputs[1:], self._resamples(found.uid)) if found.uid else None

    def _passes(self, loaded: Batch) -> Iterator[Tensor]:
        """One set of weights a pass, the same for all studies and tiles."""
        batch = self.subject.normaliser(loaded.to(self.device))
        keys = noise.sample_keys(self.job.seed, STREAM, None, batch.uid, self.job.passes)
        return self.model.passes(batch, keys, weight_keys(self.job.seed, None, self.job.passes, keys.device))

    def _resamples(self, uid: list[int]) -> Resamples:
        table = self.subject.release.subjects()
        subject = dict(zip(table["uid"].to_pylist(), table["subject"].to_pylist(), strict=True))
        _, number = np.unique([subject[each] for each in uid], return_inverse=True)
        return Resamples(number, replicates=self.job.bootstrap, seed=self.job.seed)


@dataclass
class _Found:
    """What was found in a split so far: numbers of every study, counts of all together."""

    uid: list[int]
    rows: list[tuple[float, ...]]
    overlap: Overlap | None
    errors: dict[str, ErrorDetection]

    def add(self, score: StudyScore) -> None:
        """One study more."""
        self.uid.append(score.uid)
        dice = score.overlap.dice[1:]
        self.rows.append((score.nll, mean_defined(dice), *dice.tolist(), *(score.errors[name].auroc for name in UNCERTAINTIES)))
        self.overlap = score.overlap if self.overlap is None else self.overlap + score.overlap
        for name, errors in score.errors.items():
            self.errors[name] = self.errors[name] + errors if name in self.errors else errors

    def result(self, split: Split, structures: tuple[str, ...], resamples: Resamples) -> MaskSplit:
        """All numbers of the split."""
        assert self.overlap is not None  # there is a study
        columns = np.array(self.rows).T
        means = estimate_all(lambda rows: {str(n): mean_defined(values[rows]) for n, values in enumerate(columns)}, resamples)
        nll, *others = means.values()
        pooled = zip(structures, self.overlap.dice[1:].tolist(), strict=True)
        return MaskSplit(
            split=split,
            num_studies=len(self.uid),
            num_voxels=int(self.overlap.true.sum()),
            nll=nll,
            dice=dict(zip((MEAN, *structures), others[: len(structures) + 1], strict=True)),
            error_auroc=dict(zip(UNCERTAINTIES, others[len(structures) + 1 :], strict=True)),
            pooled=PooledScores(
                dice={name: _or_none(value) for name, value in pooled},
                error_auroc={name: _or_none(errors.auroc) for name, errors in self.errors.items()},
            ),
        )


def _overlap(model: BayesianUnet, release: Release) -> int:
    """A sixth of the patch, where the padding of a network's convolutions is felt most."""
    image = model.config.image_of(release.schema)
    return 0 if isinstance(image, ImageSpec) else min(image.delivered) // 6


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value
