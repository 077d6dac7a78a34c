"""Which steps of a series count, and means over them."""

import torch
from torch import Tensor

from draf_dist.schema.batch import SeriesInput


def counted_steps(series: SeriesInput) -> Tensor:
    """Which steps count, those before the length: bool (B, T)."""
    return torch.arange(series.values.shape[1], device=series.length.device) < series.length.unsqueeze(1)


def masked_mean(tokens: Tensor, counts: Tensor) -> Tensor:
    """Mean of (S, B, T, hidden) over the steps that count (B, T); 0 where none does."""
    weights = counts.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(2) / weights.sum(1).clamp_min(1)
