"""Attention over the places of an image at several levels of a network (BSSL proposal 2.3.1; spec 3.6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Attention:
    """levels: A^l f32 (B, *space_l), each on the grid of its own features. beta: f32 (L,). composite: A f32 (B, *space).

    Every map of a row sums to 1, and so does beta.
    """

    levels: tuple[Tensor, ...]
    beta: Tensor
    composite: Tensor


class SpatialAttention(nn.Module):
    """A^l = softmax over places of a 1x1 convolution of F^l to one channel; A = sum_l beta_l A^l, beta = softmax(b).

    From the proposal: one module a level, importances that are learned. By spec 3.6: the softmax, and that maps are brought to one
    grid by linear interpolation and made to sum to 1 again before they are added. b starts at 0: all levels count the same.
    """

    def __init__(self, widths: Sequence[int], dimensions: int) -> None:
        """widths: channels of each level. dimensions: 2 or 3."""
        super().__init__()
        conv = nn.Conv2d if dimensions == 2 else nn.Conv3d
        # A bias would not outlive the softmax.
        self.scores = nn.ModuleList(conv(width, 1, 1, bias=False) for width in widths)
        self.importance = nn.Parameter(torch.zeros(len(widths)))

    def forward(self, features: Sequence[Tensor], space: torch.Size) -> Attention:
        """Features (B, C_l, *space_l) of every level to maps; space: sides of the grid of the composite."""
        levels = tuple(spatial_softmax(score(level).squeeze(1)) for score, level in zip(self.scores, features, strict=True))
        beta = self.importance.softmax(0)
        raised = torch.stack([on_grid(level, space) for level in levels])
        # No matrix product: under autocast it would be of half precision, and A would not sum to 1.
        return Attention(levels, beta, (beta.view(-1, *[1] * (raised.dim() - 1)) * raised).sum(0))


def spatial_softmax(scores: Tensor) -> Tensor:
    """Scores (B, *space) to weights that sum to 1 over all places of a row, in f32 at least."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return wide.flatten(1).softmax(1).view_as(wide)


def on_grid(weights: Tensor, space: torch.Size) -> Tensor:
    """Weights (B, *space_l) interpolated linearly to another grid, where they sum to 1 again."""
    mode = "bilinear" if len(space) == 2 else "trilinear"
    raised = functional.interpolate(weights.unsqueeze(1), size=space, mode=mode, align_corners=False).squeeze(1)
    total = raised.flatten(1).sum(1).view(-1, *[1] * len(space))
    return raised / total


def relative_to_peak(weights: Tensor) -> Tensor:
    """Weights (B, *space) divided by the largest of each row: in (0, 1], whatever the number of places."""
    return weights / weights.flatten(1).amax(1).view(-1, *[1] * (weights.dim() - 1))


def attention_entropy(weights: Tensor) -> Tensor:
    """H(A) / ln(places) of weights (B, *space), to (B,): 1 where attention is even, 0 where one place has it all."""
    flat = weights.flatten(1)
    entropy: Tensor = -torch.special.xlogy(flat, flat).sum(1)
    return entropy / math.log(flat.shape[1])


def damped(weights: Tensor, uncertainty: Tensor) -> Tensor:
    """A (1 - U / max U), both (B, *space): for display, so that what is uncertain does not stand out (spec 3.6, item 1)."""
    highest = uncertainty.flatten(1).amax(1).view(-1, *[1] * (weights.dim() - 1))
    return weights * (1 - uncertainty / highest.clamp_min(torch.finfo(uncertainty.dtype).tiny))
