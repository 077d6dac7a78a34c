"""A smooth deformation that never folds the image."""

import functools
import math
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import Fractions
from draf_dist.augment.transform import Parameters, Size, between, centres, on_axis, resample, rows_of_block
from draf_dist.config.spec import Spec

# The largest sum of |d u_i / d x_j| over j that is let through; below 1 the Jacobian I + du/dx is diagonally dominant.
STEEPEST = 0.9


class Elastic(Spec):
    """x(p + u(p)), u a cubic B-spline over `cells` cells of random control points along every axis.

    displacement: the largest component of u of a sample, as a fraction of the extent, uniform between the two bounds. Where a
    field of that size could fold it is made smaller: a slope of a spline is at most the largest difference of neighbouring
    control points over their distance, and these slopes are held below 1, so that det(I + du/dp) > 0 everywhere, between
    pixels too.
    """

    kind: Literal["elastic"] = "elastic"
    displacement: Fractions = (0.005, 0.015)
    cells: int = Field(5, ge=1)

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Control f32 (B, axes, cells + 3, ..): ((u_z,) u_y, u_x) of the control points, in fractions of the extent."""
        axes, side = len(size), self.cells + 3
        draws = noise.uniform(keys, (1 + axes * side**axes,))
        control = (2 * draws[:, 1:] - 1).view(-1, axes, *(side for _ in size))
        rows = rows_of_block(axes * math.prod(size), control)
        peak = torch.cat([_largest(spline(part, size)) for part in torch.split(control, rows)])
        wanted = between(draws[:, 0], self.displacement) / peak.clamp_min(1e-6)
        allowed = STEEPEST / self._steepness(control).clamp_min(1e-6)
        return {"control": control * torch.minimum(wanted, allowed).view(-1, *(1 for _ in control.shape[1:]))}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images, deformed."""
        size = image.shape[2:]
        field = spline(parameters["control"], size)
        at = [on_axis(centres(length, image.device), axis, size) for axis, length in enumerate(size)]
        return resample(image, *(point + field[:, axis] for axis, point in enumerate(at)))

    def _steepness(self, control: Tensor) -> Tensor:
        """A bound (B,) of the sum over j of |d u_i / d p_j|, the largest of all components i."""
        axes = range(2, control.ndim)
        slopes = [control.diff(dim=axis).abs().amax(tuple(axes)) * self.cells for axis in axes]
        return sum(slopes[1:], slopes[0]).amax(dim=1)


def spline(control: Tensor, size: Size) -> Tensor:
    """The uniform cubic B-spline of control (B, components, n + 3, ..) at pixel centres: (B, components, *size)."""
    if len(size) == 2:
        # The order of the axes is in the rounding, and images have always begun with y. What is last runs over whole columns.
        return _along(_along(control.transpose(2, 3).contiguous(), 3, size[0]), 2, size[1]).transpose(2, 3)
    for axis in reversed(range(len(size))):
        control = _along(control, 2 + axis, size[axis])
    return control


def _along(control: Tensor, axis: int, length: int) -> Tensor:
    starts, weights = _taps(control.shape[axis] - 3, length, control.device)
    values = control.new_empty((*control.shape[:axis], length, *control.shape[axis + 1 :]))
    shape = (-1, *(1 for _ in control.shape[axis + 1 :]))
    # Cell by cell, so that nothing is gathered. Sums of four products in a fixed order, not a matrix product, whose rounding may
    # depend on the size of the batch.
    for cell, (start, stop) in enumerate(pairwise(starts)):
        part = values.narrow(axis, start, stop - start)
        taps = [(control.narrow(axis, cell + k, 1), weight[start:stop].view(shape)) for k, weight in enumerate(weights)]
        torch.mul(*taps[0], out=part)
        for tap, weight in taps[1:]:
            part += tap * weight
    return values


@functools.lru_cache(maxsize=64)
def _taps(cells: int, length: int, device: torch.device) -> tuple[list[int], Tensor]:
    """The first pixel of every cell, and of one more; the weights of the four control points around each pixel, (4, length)."""
    with torch.inference_mode(mode=False):
        place = centres(length, torch.device("cpu")) * cells
        first = place.long().clamp_max(cells - 1)
        t = place - first
        weights = ((1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6)
        starts: list[int] = torch.searchsorted(first, torch.arange(cells + 1)).tolist()
        return starts, torch.stack(weights).to(device)


def _largest(field: Tensor) -> Tensor:
    """The largest component in size, (B,)."""
    axes = tuple(range(1, field.ndim))
    return torch.maximum(field.amax(axes), -field.amin(axes))
