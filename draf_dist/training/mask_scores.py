"""What validation says of masks: each volume (or image) by itself, then the mean over them; nothing is kept of a voxel."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draf_dist.metrics.segmentation import ErrorDetection, Overlap
from draf_dist.models.link import link_of
from draf_dist.models.segmentation import BayesianUnet
from draf_dist.models.streamed import StreamedUncertainty, streamed
from draf_dist.schema.batch import Batch, SegmentationTarget
from draf_dist.schema.label import IGNORED

# Of the studies whose target is known: the prediction first, then what is known, n rows each.
Columns = tuple[Tensor, ...]
Arrays = Sequence[NDArray[np.float64]]
# The entropy of the mean prediction, and its epistemic part.
UNCERTAINTIES = ("entropy", "epistemic")


@dataclass(frozen=True)
class StudyScore:
    """Of one study with a mask. nll: the mean over known voxels of -log of the mean over passes of the probability, in nats.

    overlap: of the most probable structure with the true one. errors: how an uncertainty of UNCERTAINTIES finds wrong voxels.
    """

    uid: int
    nll: float
    overlap: Overlap
    errors: dict[str, ErrorDetection]


def score_masks(model: BayesianUnet, batch: Batch, keys: Tensor, weights: Tensor) -> Iterator[StudyScore]:
    """The scores of a prepared batch, one pass in memory at a time; keys (S, B), weights (S,): see BayesianUnet.passes.

    A study without the image that the model reads has none.
    """
    assert isinstance(batch.target, SegmentationTarget)  # the schema says so
    found = streamed(model.passes(batch, keys, weights), link_of(model.tasks[model.label]))
    return study_scores(found, batch.target, batch.weight * batch.present[:, model.axis], batch.uid)


def study_scores(found: StreamedUncertainty, target: SegmentationTarget, weight: Tensor, uid: Tensor) -> Iterator[StudyScore]:
    """The scores of every row that counts; weight: f32 (B,), 0 for rows that do not; uid: int64 (B,)."""
    known = (weight > 0) & target.observed & (target.mask != IGNORED).flatten(1).any(1)
    mean, maps = found.probability, found.uncertainties()
    for row in known.nonzero()[:, 0].tolist():
        yield _of_row(int(uid[row]), mean[row], target.mask[row], {name: maps[name][row] for name in UNCERTAINTIES})


def mask_columns(scores: Iterable[StudyScore], num_structures: int, device: torch.device) -> Columns:
    """NLL (n,), Dice of every structure but the background (n, K - 1), AUROC of finding errors (n, uncertainties); f64.

    NaN where not defined. num_structures: K.
    """
    rows = [(score.nll, score.overlap.dice[1:], [score.errors[name].auroc for name in UNCERTAINTIES]) for score in scores]
    shapes = ((0,), (0, num_structures - 1), (0, len(UNCERTAINTIES)))
    parts = (
        [np.array(part, dtype=np.float64) for part in zip(*rows, strict=True)] if rows else [np.zeros(shape) for shape in shapes]
    )
    return tuple(torch.from_numpy(part).to(device) for part in parts)


def of_masks(columns: Arrays) -> dict[str, float]:
    """Means over studies, NLL first: `dice` of each study's mean over its structures, `dice_k` of structure k of the label.

    error_auroc, error_auroc_epistemic: how well the entropy of a study's voxels, or their epistemic part, finds the wrong ones.
    """
    nll, dice, auroc = columns
    each = {f"dice_{number + 1}": mean_defined(values) for number, values in enumerate(dice.T)} if dice.shape[1] > 1 else {}
    by_study = np.array([mean_defined(row) for row in dice])
    errors = {"error_auroc": mean_defined(auroc[:, 0]), "error_auroc_epistemic": mean_defined(auroc[:, 1])}
    return {"nll": float(nll.mean()), "dice": mean_defined(by_study), **each, **errors}


def _of_row(uid: int, probability: Tensor, mask: Tensor, maps: Mapping[str, Tensor]) -> StudyScore:
    """Of probability (K, *space), mask and maps (*space)."""
    known = mask != IGNORED
    truth, found = mask[known], probability[:, known]
    log = found.gather(0, truth[None])[0].double().clamp_min(1e-12).log()
    chosen = found.argmax(0)
    overlap = Overlap.of(chosen.cpu().numpy(), truth.cpu().numpy(), probability.shape[0])
    wrong = (chosen != truth).cpu().numpy()
    errors = {name: ErrorDetection.of(values[known].cpu().numpy(), wrong) for name, values in maps.items()}
    return StudyScore(uid, -float(log.mean()), overlap, errors)


def mean_defined(values: NDArray[np.float64]) -> float:
    """The mean of what is not NaN; NaN where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
