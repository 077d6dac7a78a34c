"""What every transform of this folder has in common."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

# What was applied to each sample, by name, first axis B. `apply` reads nothing else, so a record repeats the view.
Parameters = dict[str, Tensor]

# Kind of transform -> its parameters.
Applied = dict[str, Parameters]

# (H, W) of images, (D, H, W) of volumes.
Size = tuple[int, ...]


class Transform(Protocol):
    """A batched transform of images f32 (B, C, H, W) or volumes (B, C, D, H, W), on whatever device they are.

    Parameters are sampled first, from one noise key per sample, int64 (B,), then applied; no row depends on another row.
    """

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """The parameters of every key, for images of this size."""
        ...

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images under their parameters, a new tensor."""
        ...


# Values of one block. On the CPU what is made of them stays in the cache; a GPU wants few large kernels.
BLOCK_CPU = 1 << 18


def rows_of_block(values: int, like: Tensor) -> int:
    """How many rows of so many values each are worked on at once, on the device of `like`."""
    return max(1, BLOCK_CPU // values) if like.is_cpu else max(1, len(like))


def in_blocks(image: Tensor, applied: Applied, run: Callable[[Tensor, Applied], Tensor]) -> Tensor:
    """run(image, applied), a block of rows at a time. As no row depends on another, the result does not depend on it."""
    rows = rows_of_block(math.prod(image.shape[1:]), image)
    if rows >= len(image):
        return run(image, applied)
    parts = []
    for start in range(0, len(image), rows):
        here = slice(start, start + rows)
        mine = {kind: {name: values[here] for name, values in parameters.items()} for kind, parameters in applied.items()}
        parts.append(run(image[here], mine))
    return torch.cat(parts)


def between(uniform: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Numbers in [0, 1) spread over [low, high)."""
    low, high = bounds
    return low + (high - low) * uniform


def centres(length: int, device: torch.device) -> Tensor:
    """Where the pixels of an axis lie, as fractions of its extent: f32 (length,)."""
    return (torch.arange(length, dtype=torch.float32, device=device) + 0.5) / length


def spatial(image: Tensor) -> tuple[int, ...]:
    """The axes of an image or volume beside batch and channels."""
    return tuple(range(2, image.ndim))


def by_row(values: Tensor, image: Tensor) -> Tensor:
    """One number a row, (B,), so that it broadcasts over the image."""
    return values.view(-1, *(1 for _ in image.shape[1:]))


def on_axis(values: Tensor, axis: int, size: Size) -> Tensor:
    """Values (length,) or (B, length) along one axis of a grid of that many axes: (1 or B, 1, .., length, .., 1)."""
    return values.view(-1, *(values.shape[-1] if other == axis else 1 for other in range(len(size))))


def resample(image: Tensor, *points: Tensor) -> Tensor:
    """The image read at points, one tensor an axis, in fractions of its extent: linear, the edge continued outwards.

    Each of the points broadcasts to f32 (B, *size), the size of the result being that of the image.
    """
    size = image.shape[2:]
    grid = image.new_empty((image.shape[0], *size, len(size)), dtype=torch.float32)
    for place, point in enumerate(reversed(points)):
        grid[..., place] = point
    return sample_grid(image, grid.mul_(2).sub_(1))


def sample_grid(image: Tensor, grid: Tensor) -> Tensor:
    """The image read at grid (B, *size, axes), from -1 to 1 between the outer edges, the last axis of the image first."""
    return functional.grid_sample(image, grid.to(image.dtype), mode="bilinear", padding_mode="border", align_corners=False)
