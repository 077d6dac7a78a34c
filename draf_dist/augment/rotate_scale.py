"""The posture of the patient and the distance of the tube."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import Positive
from draf_dist.augment.transform import Parameters, Size, between, centres, on_axis, resample
from draf_dist.augment.warp import Affine
from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain

Spacing = tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]


class RotateScale(Spec):
    """Rotation about the centre by up to max_degrees either way, and magnification by `scale`.

    A volume turns about an axis of any direction. No translation, which would move the region label, and no left-right flip,
    which would mirror the heart.

    spacing: the size of a voxel along (H, W) or (D, H, W), in any one unit, so that what is turned keeps its shape; None: all
    alike.
    """

    kind: Literal["rotate_scale"] = "rotate_scale"
    max_degrees: float = Field(7.0, ge=0, le=45)
    scale: Positive = (0.9, 1.1)
    spacing: Spacing | None = Field(None, exclude_if=lambda spacing: spacing is None)

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Degrees (B,), positive is counter-clockwise; scale (B,), above 1 is larger; of volumes axis (B, 3), a unit vector.

        Counter-clockwise is as in an image (H, W), to someone who sees the axis (D) come out of it.

        Raises:
            SpecError: the spacing is of another number of axes.
        """
        self._check_axes(len(size))
        draws = noise.uniform(keys, (2 if len(size) == 2 else 4,))
        turn = between(draws[:, 0], (-self.max_degrees, self.max_degrees))
        parameters = {"degrees": turn, "scale": between(draws[:, 1], self.scale)}
        return parameters if len(size) == 2 else {**parameters, "axis": _direction(draws[:, 2], draws[:, 3])}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images, turned in units of length (not in fractions of an extent that may differ by axis)."""
        size = image.shape[2:]
        extents = self._extents(size)
        at = [on_axis((centres(n, image.device) - 0.5) * extents[axis], axis, size) for axis, n in enumerate(size)]
        factor = on_axis(parameters["scale"][:, None], 0, size)
        points = []
        for row, extent in zip(_inverse_rotation(parameters), extents, strict=True):
            turned = [on_axis(part[:, None], 0, size) * place for part, place in zip(row, at, strict=True)]
            points.append(sum(turned[1:], turned[0]).div_(factor).div_(extent).add_(0.5))
        return resample(image, *points)

    def affine(self, parameters: Parameters, size: Size) -> Affine:
        """The same as an affine map of points in fractions of the extent, for a warp."""
        extents = torch.tensor(self._extents(size), device=parameters["scale"].device)
        turn = torch.stack([torch.stack(row, dim=1) for row in _inverse_rotation(parameters)], dim=1)
        matrix = turn * (extents / extents[:, None]) / parameters["scale"][:, None, None]
        return Affine(matrix, 0.5 - 0.5 * matrix.sum(dim=2))

    def _extents(self, size: Size) -> list[float]:
        return [length * voxel for length, voxel in zip(size, self.spacing or (1.0,) * len(size), strict=True)]

    def _check_axes(self, axes: int) -> None:
        if self.spacing is not None and len(self.spacing) != axes:
            remedy = "Give one number for each axis of the images."
            raise SpecError(
                explain("rotate_scale: spacing", expected=f"{axes} numbers", found=str(len(self.spacing)), remedy=remedy)
            )


def _direction(height: Tensor, turn: Tensor) -> Tensor:
    """Unit vectors (B, 3), uniform on the sphere, of two uniform numbers each (Archimedes)."""
    along, around = 1 - 2 * height, (2 * math.pi) * turn
    radius = (1 - along.square()).sqrt()
    return torch.stack([along, radius * around.sin(), radius * around.cos()], dim=1)


def _inverse_rotation(parameters: Parameters) -> list[list[Tensor]]:
    """Where a point of the result is read from, before magnification: a matrix of (B,), rows and columns as the axes."""
    angle = parameters["degrees"] * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    if "axis" not in parameters:
        return [[cos, sin], [-sin, cos]]
    d, h, w = parameters["axis"].unbind(dim=1)
    rest = 1 - cos
    # Rodrigues: cos I - sin K + (1 - cos) a a^T, K the matrix of a cross product: the rotation by minus the angle.
    return [
        [cos + rest * d * d, rest * d * h + sin * w, rest * d * w - sin * h],
        [rest * h * d - sin * w, cos + rest * h * h, rest * h * w + sin * d],
        [rest * w * d + sin * h, rest * w * h - sin * d, cos + rest * w * w],
    ]
