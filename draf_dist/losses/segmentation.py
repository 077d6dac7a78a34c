"""The loss of a segmentation: soft Dice and cross-entropy, each as (numerator, weight) over the local rows (spec 3.6)."""

import torch
from torch import Tensor
from torch.nn import functional

from draf_dist.schema.batch import SegmentationTarget, Term
from draf_dist.schema.label import IGNORED


def segmentation_terms(logits: Tensor, target: SegmentationTarget, weight: Tensor) -> dict[str, Term]:
    """Terms dice and cross_entropy of logits (S, B, K, *space): of each pass and row, then the mean over passes, then over rows.

    Rows are never summed up before the quotient is taken, as a Dice over the batch would do it, so the loss does not depend on
    which rows stand together. Unobserved rows and IGNORED voxels count nothing; a row whose mask is all background has no Dice.
    """
    counted = weight * (target.observed & (target.mask != IGNORED).flatten(1).any(1))
    overlap, has_structure = dice(logits, target.mask)
    has_structure = has_structure & target.observed
    missed = torch.where(has_structure, 1 - overlap, 0.0).mean(0)
    with_structure = counted * has_structure
    entropy = torch.where(target.observed, voxel_cross_entropy(logits, target.mask), 0.0).mean(0)
    return {
        "dice": Term((with_structure * missed).sum(), with_structure.sum()),
        "cross_entropy": Term((counted * entropy).sum(), counted.sum()),
    }


def dice(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Soft Dice (S, B) of logits (S, B, K, *space), and whether it is defined, bool (B,); mask int64 (B, *space).

    2 sum p y / (sum p + sum y) of each structure (oracle O20), in the mean over those of 1 .. K - 1 that the row's mask holds
    [ours]: the background needs no help, and of a structure that is not there the quotient is 0 whatever the prediction; where
    something is seen that is not there, the cross-entropy says so. 0 where not defined. IGNORED voxels are in no sum.
    """
    known = (mask != IGNORED).flatten(1)[:, None]
    probability = torch.where(known, logits.softmax(2)[:, :, 1:].flatten(3), 0.0)
    truth = functional.one_hot(mask.flatten(1).clamp_min(0), logits.shape[2])[..., 1:].movedim(-1, 1).to(probability.dtype)
    size = truth.sum(-1)
    occurs = size > 0
    each = 2 * (probability * truth).sum(-1) / (probability.sum(-1) + size)
    return torch.where(occurs, each, 0.0).sum(-1) / occurs.sum(-1).clamp_min(1), occurs.any(-1)


def voxel_cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """The mean over known voxels of -log softmax(logits)[mask], (S, B) of logits (S, B, K, *space); mask int64 (B, *space)."""
    repeated = mask.expand(logits.shape[0], *mask.shape).flatten(0, 1)
    losses = functional.cross_entropy(logits.flatten(0, 1), repeated, ignore_index=IGNORED, reduction="none")
    known = (mask != IGNORED).flatten(1).sum(1).clamp_min(1)
    return losses.flatten(1).sum(1).view(logits.shape[:2]) / known
