"""A part of the image, and where in the body it lies."""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import Fractions
from draf_dist.augment.transform import Parameters, Size, between, centres, on_axis, resample
from draf_dist.augment.warp import Affine
from draf_dist.config.spec import Spec


class RandomCrop(Spec):
    """A window of `side` of the extent, the same along all axes, resampled to the size of the image.

    The region label is the cell of a grid of `grid` cells along every axis of the whole image in which the centre of the window
    lies, counted row by row (and slice by slice). The cell is drawn first, uniformly, then the centre within it, as far as the
    window stays within the image: so no region is rare.
    """

    kind: Literal["random_crop"] = "random_crop"
    side: Fractions = (0.4, 0.6)
    grid: int = Field(3, ge=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.side[1] >= 2 / self.grid:
            raise ValueError(
                f"a window of {self.side[1]:g} can't have its centre in an outer cell of {self.grid}; stay below 2/grid"
            )
        return self

    def regions_of(self, axes: int) -> int:
        """Classes of the region label of what has so many axes: on a grid of 3, 9 of an image and 27 of a volume."""
        regions: int = self.grid**axes
        return regions

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Side (B,); centre (B, axes), (y, x) or (z, y, x) in fractions of the extent; region int64 (B,)."""
        axes = len(size)
        draws = noise.uniform(keys, (2 + axes,))
        side = between(draws[:, 0], self.side)
        region = (draws[:, 1] * self.regions_of(axes)).long()
        cell = torch.stack([region // self.regions_of(axes - 1 - axis) % self.grid for axis in range(axes)], dim=1)
        low = torch.maximum(cell / self.grid, side[:, None] / 2)
        high = torch.minimum((cell + 1) / self.grid, 1 - side[:, None] / 2)
        return {"side": side, "centre": low + (high - low) * draws[:, 2:], "region": region}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The windows, of the shape of the images."""
        side, size = parameters["side"][:, None], image.shape[2:]
        points = [
            parameters["centre"][:, axis, None] + side * (centres(length, image.device) - 0.5) for axis, length in enumerate(size)
        ]
        return resample(image, *(on_axis(point, axis, size) for axis, point in enumerate(points)))

    def affine(self, parameters: Parameters) -> Affine:
        """The same as an affine map, for a warp."""
        side, centre = parameters["side"], parameters["centre"]
        identity = torch.eye(centre.shape[1], device=side.device)
        return Affine(identity * side[:, None, None], centre - side[:, None] / 2)
