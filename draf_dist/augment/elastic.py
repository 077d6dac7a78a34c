"""A smooth deformation that never folds the image."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import Fractions
from draf_dist.augment.transform import Parameters, between, centres, resample
from draf_dist.config.spec import Spec

# The largest sum of |d u_i / d x_j| over j that is let through; below 1 the Jacobian I + du/dx is diagonally dominant.
STEEPEST = 0.9


class Elastic(Spec):
    """x(p + u(p)), u a cubic B-spline over cells x cells random control points.

    displacement: the largest |u_y| or |u_x| of a sample, as a fraction of the extent, uniform between the two bounds. Where a
    field of that size could fold it is made smaller: a slope of a spline is at most the largest difference of neighbouring
    control points over their distance, and these slopes are held below 1, so that det(I + du/dp) > 0 everywhere, between
    pixels too.
    """

    kind: Literal["elastic"] = "elastic"
    displacement: Fractions = (0.005, 0.015)
    cells: int = Field(5, ge=1)

    def sample(self, keys: Tensor, size: tuple[int, int]) -> Parameters:
        """Control f32 (B, 2, cells + 3, cells + 3): (u_y, u_x) of the control points, in fractions of the extent."""
        side = self.cells + 3
        draws = noise.uniform(keys, (1 + 2 * side * side,))
        control = (2 * draws[:, 1:] - 1).view(-1, 2, side, side)
        peak = spline(control, size).abs().amax((1, 2, 3))
        wanted = between(draws[:, 0], self.displacement) / peak.clamp_min(1e-6)
        allowed = STEEPEST / self._steepness(control).clamp_min(1e-6)
        return {"control": control * torch.minimum(wanted, allowed).view(-1, 1, 1, 1)}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images, deformed."""
        height, width = image.shape[-2:]
        u_y, u_x = spline(parameters["control"], (height, width)).unbind(dim=1)
        y, x = centres(height, image.device).view(-1, 1), centres(width, image.device)
        return resample(image, y + u_y, x + u_x)

    def _steepness(self, control: Tensor) -> Tensor:
        """A bound (B,) of the sum over j of |d u_i / d p_j|, the larger of i = y, x."""
        slopes = [control.diff(dim=axis).abs().amax((-2, -1)) * self.cells for axis in (-2, -1)]
        return (slopes[0] + slopes[1]).amax(dim=1)


def spline(control: Tensor, size: tuple[int, int]) -> Tensor:
    """The uniform cubic B-spline of control (B, 2, n + 3, n + 3) at pixel centres: (B, 2, H, W)."""
    return _along(_along(control, -2, size[0]), -1, size[1])


def _along(control: Tensor, axis: int, length: int) -> Tensor:
    cells = control.shape[axis] - 3
    place = centres(length, control.device) * cells
    first = place.long().clamp_max(cells - 1)
    t = place - first
    weights = ((1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6)
    # Sums of four products in a fixed order, not a matrix product, whose rounding may depend on the size of the batch.
    taps = [control.index_select(axis, first + k) * (w if axis == -1 else w.unsqueeze(-1)) for k, w in enumerate(weights)]
    return ((taps[0] + taps[1]) + taps[2]) + taps[3]
