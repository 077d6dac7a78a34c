"""What every transform of this folder has in common."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

# What was applied to each sample, by name, first axis B. `apply` reads nothing else, so a record repeats the view.
Parameters = dict[str, Tensor]


class Transform(Protocol):
    """A batched transform of normalised images f32 (B, C, H, W), on whatever device they are.

    Parameters are sampled first, from one noise key per sample, int64 (B,), then applied; no row depends on another row.
    """

    def sample(self, keys: Tensor, size: tuple[int, int]) -> Parameters:
        """The parameters of every key, for images of size (H, W)."""
        ...

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images under their parameters, a new tensor."""
        ...


def between(uniform: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Numbers in [0, 1) spread over [low, high)."""
    low, high = bounds
    return low + (high - low) * uniform


def centres(length: int, device: torch.device) -> Tensor:
    """Where the pixels of an axis lie, as fractions of its extent: f32 (length,)."""
    return (torch.arange(length, dtype=torch.float32, device=device) + 0.5) / length


def resample(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The image read at (y, x), each f32 (B, H', W') in fractions of its extent: bilinear, the edge continued outwards."""
    grid = torch.stack([2 * x - 1, 2 * y - 1], dim=-1)
    return functional.grid_sample(image, grid.to(image.dtype), mode="bilinear", padding_mode="border", align_corners=False)
