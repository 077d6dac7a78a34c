"""MUSE's contrastive pair over the whole global batch: which patient is this, and has that one the same label (spec 2.2)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from draf_dist.losses.gather import Embeddings, Gather, one_process
from draf_dist.schema.batch import ClassTarget, MultiLabelTarget, SurvivalTarget, Target, Term
from draf_dist.schema.label import MultiLabelSpec, TaskSpec


@dataclass(frozen=True)
class Labels:
    """value, known: f32 (N, L); what is not known has value 0."""

    value: Tensor
    known: Tensor


def labels_of(target: Target) -> Labels:
    """What two studies can have in common: their class; every label of several; the interval of an event that was seen.

    Of a censored time no more is known than that it is later, so it is the same as no other [ours].

    Raises:
        TypeError: a mask is no label of a study.
    """
    match target:
        case ClassTarget():
            value, known = target.label[:, None], target.observed[:, None]
        case MultiLabelTarget():
            value, known = target.label, target.observed
        case SurvivalTarget():
            value, known = target.interval[:, None], (target.observed & target.event)[:, None]
        case _:
            raise TypeError(f"{type(target).__name__} has no label of a study")
    return Labels(torch.where(known, value, 0).float(), known.float())


def num_labels(task: TaskSpec) -> int:
    """L of `labels_of` for a task."""
    return len(task.labels) if isinstance(task, MultiLabelSpec) else 1


def with_labels(rows: Embeddings, labels: Labels) -> Embeddings:
    """The rows with labels as further columns of the first view, and zeros beside the second.

    What couples the global batch sees Embeddings alone, which a loop may have cut off from their graph; a number in a column goes
    wherever its row goes, exactly up to 2**24.
    """
    dtype = torch.promote_types(rows.first.dtype, torch.float32)
    first, second = rows.first.to(dtype), rows.second.to(dtype)
    columns = torch.cat([labels.value, labels.known], 1).to(dtype)
    return replace(rows, first=torch.cat([first, columns], 1), second=torch.cat([second, torch.zeros_like(columns)], 1))


def patient_contrast(local: Embeddings, count: int, gather: Gather = one_process) -> dict[str, Term]:
    """Both terms of rows made by `with_labels`, with L = count; similarities are products of embeddings, scaled already.

    unsupervised: the mean over rows of [CE(s(u, u'), own) + CE(s(u', u), own)] / 2, symmetric InfoNCE between the views. A study
    that was drawn twice is no negative of itself [ours]. supervised: with y_ij = 1 for the same label, the means over all pairs
    (i, j), i = j among them, of BCE(s_ij, y_ij) on u-u (weight 1/2), u-u' and u'-u (1/4 each). Of several labels y is the share of
    those known of both that agree [ours]; pairs of which no label is known of both have no part in it.

    In f32 at least, whatever the caller's autocast says.
    """
    with torch.autocast(local.first.device.type, enabled=False):
        rows = gather(_cleared(local))
        mine, all_ = _cut(_cleared(local), count), _cut(rows, count)
        own = local.valid.to(local.first.dtype)
        return {
            "contrastive": Term((own * _info_nce(local, mine, rows, all_)).sum(), own.sum()),
            "supervised": _same_label(mine, all_, own[:, None] * rows.valid),
        }


@dataclass(frozen=True)
class _Views:
    first: Tensor
    second: Tensor
    labels: Labels


def _cleared(rows: Embeddings) -> Embeddings:
    """Zeros where a row is not valid."""
    valid = rows.valid[:, None]
    return replace(rows, first=torch.where(valid, rows.first, 0.0), second=torch.where(valid, rows.second, 0.0))


def _cut(rows: Embeddings, count: int) -> _Views:
    width = rows.first.shape[1] - 2 * count
    value, known = torch.split(rows.first[:, width:].detach(), count, 1)
    return _Views(rows.first[:, :width], rows.second[:, :width], Labels(value, known))


def _info_nce(local: Embeddings, mine: _Views, rows: Embeddings, all_: _Views) -> Tensor:
    """Of every local row (n,), the mean over both directions."""
    positive = (mine.first * mine.second).sum(1)
    negative = (local.uid[:, None] != rows.uid) & rows.valid

    def one_way(anchors: Tensor, others: Tensor) -> Tensor:
        similarity = torch.where(negative, anchors @ others.T, -torch.inf)
        return torch.logsumexp(torch.cat([positive[:, None], similarity], 1), 1) - positive

    return (one_way(mine.first, all_.second) + one_way(mine.second, all_.first)) / 2


def _same_label(mine: _Views, all_: _Views, valid: Tensor) -> Term:
    """Over pairs of a local row and any, (n, N)."""
    both = mine.labels.known[:, None] * all_.labels.known
    agree = both * (mine.labels.value[:, None] == all_.labels.value)
    known = both.sum(-1)
    same = agree.sum(-1) / known.clamp_min(1)
    pairs = valid * (known > 0)
    losses = sum(
        share * functional.binary_cross_entropy_with_logits(anchors @ others.T, same, reduction="none")
        for share, anchors, others in (
            (0.5, mine.first, all_.first),
            (0.25, mine.first, all_.second),
            (0.25, mine.second, all_.first),
        )
    )
    assert isinstance(losses, Tensor)
    return Term((pairs * losses).sum(), pairs.sum())
