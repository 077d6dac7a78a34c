"""The evaluation of a model of masks: Dice by structure, and whether its uncertainty finds its errors, with intervals.

Whole volumes, in tiles of the patches that the model was trained on. Passes are streamed: of a voxel nothing is kept but three
sums, of a study its counts.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.data.release import Release
from draf_dist.data.whole_volumes import whole_volumes
from draf_dist.errors import DataError, explain
from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.mask_picture import MaskSlice, drawn, slice_of
from draf_dist.evaluation.mask_results import MaskCounts, MaskSplit
from draf_dist.evaluation.statistics import Resamples
from draf_dist.evaluation.subject import Subject, open_subject
from draf_dist.evaluation.whole_masks import TileMaps, predicted_tiles, volume_score
from draf_dist.models.link import link_of
from draf_dist.models.segmentation import BayesianUnet, BayesianUnetConfig
from draf_dist.models.variational import weight_keys
from draf_dist.schema.batch import Batch
from draf_dist.schema.label import SegmentationSpec
from draf_dist.schema.modality import ImageSpec
from draf_dist.schema.record import Record
from draf_dist.schema.release import Split
from draf_dist.training.job import FinetuneJob
from draf_dist.training.run_folder import open_run

RESULTS = "masks.json"
PICTURE = "masks.png"
# That of other predictions: with the same seed and passes as validation, the same numbers come out.
STREAM = "mc"
# Of a volume at once; no number depends on it.
TILES_AT_ONCE = 4
# Of every split, the first ones, on the picture.
STUDIES_SHOWN = 3


class MaskEvaluation(Record):
    """masks.json of a run. overlap: voxels that neighbouring tiles of a volume share at least."""

    release: str
    model_sha256: str
    passes: int
    overlap: int
    splits: tuple[MaskSplit, ...]


def evaluate_masks(run_url: str, job: EvaluateJob, device: str = "cpu", *, release_url: str | None = None) -> MaskEvaluation | None:
    """Measures the splits of the job, writes masks.json and masks.png into the run folder; None where the label is no mask.

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
        subject.run.store.write(PICTURE, drawn(measured.slices, model.tasks[model.label].outputs))
    return result


@dataclass(frozen=True)
class _Measure:
    """What all splits have in common. slices: of the studies that are shown."""

    subject: Subject
    model: BayesianUnet
    job: EvaluateJob
    device: torch.device
    overlap: int
    slices: list[MaskSlice] = field(default_factory=list)

    def split(self, name: Split) -> MaskSplit | None:
        """None where no study has a mask."""
        task = self.model.tasks[self.model.label]
        found = MaskCounts(task.outputs[1:])
        for volume in whole_volumes(self.subject.release, name, overlap=self.overlap):
            if volume.mask is None:
                continue
            tiles: Iterable[TileMaps] = predicted_tiles(volume, self._passes, link_of(task), TILES_AT_ONCE)
            if len(found.studies) < STUDIES_SHOWN:
                tiles = tuple(tiles)
                self.slices.append(slice_of(volume, tiles, self.model.modality, f"{name}, study {len(found.studies) + 1}"))
            found.add(volume_score(volume, tiles, len(task.outputs)))
        return found.result(name, self._resamples([study.uid for study in found.studies])) if found.studies else None

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


def _overlap(model: BayesianUnet, release: Release) -> int:
    """A sixth of the patch, where the padding of a network's convolutions is felt most."""
    image = model.config.image_of(release.schema)
    return 0 if isinstance(image, ImageSpec) else min(image.delivered) // 6
