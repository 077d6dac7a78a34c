"""Several movements of an image in one reading of it: a half of the blur, and of the time, of two."""

from dataclasses import dataclass

import torch
from torch import Tensor

from draf_dist.augment.elastic import spline
from draf_dist.augment.transform import centres, on_axis, sample_grid


@dataclass(frozen=True)
class Affine:
    """Where a point of the result is read: matrix @ point + offset, in fractions of the extent.

    matrix: f32 (B, axes, axes); offset: (B, axes).
    """

    matrix: Tensor
    offset: Tensor

    def of(self, first: "Affine") -> "Affine":
        """The map that does `first`, then this: what was read of a result of this is read of the image itself."""
        return Affine(_times(self.matrix, first.matrix), _times(self.matrix, first.offset[..., None])[..., 0] + self.offset)


def warp(image: Tensor, affine: Affine, control: Tensor) -> Tensor:
    """The image read at A (p + u(p)) + b: under the affine map, then deformed by the spline of control, in one interpolation.

    image: (B, C, *size); control: of `Elastic`, (B, axes, cells + 3, ..). As A u is the spline of A times the control points,
    the field is evaluated once and the rest costs what the axes cost by themselves.
    """
    size = image.shape[2:]
    moved = _times(affine.matrix, control.flatten(2)).view_as(control)
    # From [0, 1] between the outer edges to the [-1, 1] of grid_sample.
    field = spline(2 * moved, size)
    grid = image.new_empty((image.shape[0], *size, len(size)), dtype=torch.float32)
    for axis in range(len(size)):
        point = on_axis(2 * affine.offset[:, axis, None] - 1, axis, size)
        for other, length in enumerate(size):
            slope = 2 * affine.matrix[:, axis, other, None]
            point = point + on_axis(slope * centres(length, image.device), other, size)
        torch.add(field[:, axis], point, out=grid[..., len(size) - 1 - axis])
    return sample_grid(image, grid)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """The product of small matrices (B, n, n) and (B, n, m), summed in a fixed order: no row's rounding depends on the batch."""
    terms = [left[:, :, k, None] * right[:, None, k] for k in range(left.shape[2])]
    return sum(terms[1:], terms[0])
