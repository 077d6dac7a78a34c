"""The loss of a prediction, whatever is predicted: per study, and as (numerator, weight) over the local rows."""

import torch
from torch import Tensor
from torch.nn import functional

from draf_dist.losses.survival import survival_nll
from draf_dist.schema.batch import ClassTarget, MultiLabelTarget, SurvivalTarget, Target, Term


def task_losses(logits: Tensor, target: Target) -> Tensor:
    """The loss (N, B) of logits (N, B, K) of every study, 0 where nothing is known of its target.

    A class: -log softmax(logits)[y]. Labels: the mean over the observed ones of -log sigmoid(+-logit). Survival: the negative
    log-likelihood of the hazards sigmoid(logits), losses/survival.py. Masks have a loss of their own, losses/segmentation.py.
    """
    match target:
        case ClassTarget():
            losses = _cross_entropy(logits, target.label)
        case MultiLabelTarget():
            losses = _binary_cross_entropy(logits, target)
        case SurvivalTarget():
            losses = survival_nll(logits, target.interval, target.event)
        case _:
            raise TypeError(f"{type(target).__name__} has no loss of one number a study")
    return torch.where(is_known(target), losses, 0.0)


def is_known(target: Target) -> Tensor:
    """Bool (B,): whether anything of a study's target was observed."""
    return target.observed.any(1) if isinstance(target, MultiLabelTarget) else target.observed


def task_loss(logits: Tensor, target: Target, weight: Tensor) -> Term:
    """mean_i mean_s of the losses of logits (S, B, K) over the rows whose target is known; weight (B,).

    The mean over passes of the loss of each, as MC dropout is trained (Gal and Ghahramani 2016); where all passes agree
    (`predict: mean_feature`) this is L_main of the DRAF proposal, 3.3.
    """
    counted = weight * is_known(target)
    return Term(numerator=(counted * task_losses(logits, target).mean(0)).sum(), weight=counted.sum())


def unimodal_task_loss(logits: Tensor, target: Target, present: Tensor, weight: Tensor) -> Term:
    """mean_i (mean over present m of the loss of m) of logits (S, B, M, K); absent modalities have no part in it (spec 1.2)."""
    counted = weight * is_known(target)
    losses = modality_losses(logits, target)
    per_row = torch.where(present, losses, 0.0).sum(1) / present.sum(1).clamp_min(1)
    return Term(numerator=(counted * per_row).sum(), weight=counted.sum())


def modality_losses(logits: Tensor, target: Target) -> Tensor:
    """The loss (B, M) of every modality's own logits (S, B, M, K), mean over passes; of absent ones it means nothing."""
    passes, rows, modalities, outputs = logits.shape
    flat = logits.transpose(1, 2).reshape(passes * modalities, rows, outputs)
    return task_losses(flat, target).view(passes, modalities, rows).mean(0).transpose(0, 1)


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    repeated = label.expand(logits.shape[0], -1)
    return functional.cross_entropy(logits.flatten(0, 1), repeated.flatten(), reduction="none").view(repeated.shape)


def _binary_cross_entropy(logits: Tensor, target: MultiLabelTarget) -> Tensor:
    truth = target.label.to(logits.dtype).expand_as(logits)
    losses = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return torch.where(target.observed, losses, 0.0).sum(-1) / target.observed.sum(-1).clamp_min(1)
