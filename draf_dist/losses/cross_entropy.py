"""Cross-entropy of the fused and of the unimodal predictions, as (numerator, weight) over the local rows."""

import torch
from torch import Tensor
from torch.nn import functional

from draf_dist.schema.batch import ClassTarget, Term


def cross_entropy(logits: Tensor, target: ClassTarget, weight: Tensor) -> Term:
    """mean_i mean_t -log softmax(logits_it)[y_i] over the rows whose label is observed; logits (S, B, K), weight (B,).

    The mean over passes of the loss of each, as MC dropout is trained (Gal and Ghahramani 2016); where all passes agree
    (`predict: mean_feature`) this is L_main of the DRAF proposal, 3.3.
    """
    counted = weight * target.observed
    return Term(numerator=(counted * _per_row(logits, target.label)).sum(), weight=counted.sum())


def unimodal_cross_entropy(logits: Tensor, target: ClassTarget, present: Tensor, weight: Tensor) -> Term:
    """mean_i (mean over present m of CE_m) of logits (S, B, M, K); absent modalities have no part in it (spec 1.2)."""
    counted = weight * target.observed
    passes, rows, modalities, classes = logits.shape
    flat = logits.transpose(1, 2).reshape(passes * modalities, rows, classes)
    losses = _each(flat, target.label).view(passes, modalities, rows).mean(0).transpose(0, 1)
    num_present = present.sum(1).clamp_min(1)
    per_row = torch.where(present, losses, 0.0).sum(1) / num_present
    return Term(numerator=(counted * per_row).sum(), weight=counted.sum())


def _per_row(logits: Tensor, label: Tensor) -> Tensor:
    return _each(logits, label).mean(0)


def _each(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy (N, B) of logits (N, B, K) with one label per study."""
    repeated = label.expand(logits.shape[0], -1)
    return functional.cross_entropy(logits.flatten(0, 1), repeated.flatten(), reduction="none").view(repeated.shape)
