"""Batches compared tensor by tensor."""

from dataclasses import fields

import torch
from torch import Tensor

from draf_dist.schema.batch import Batch, ClassTarget, SegmentationTarget, SeriesInput


def tensors(value: object) -> list[Tensor]:
    """Every tensor of a batch, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for name in sorted(value) for tensor in tensors(value[name])]
    if isinstance(value, Batch | SeriesInput | ClassTarget | SegmentationTarget):
        return [tensor for field in fields(value) for tensor in tensors(getattr(value, field.name))]
    return []


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
