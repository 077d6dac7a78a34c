"""A part of the image, and where in the body it lies."""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import Fractions
from draf_dist.augment.transform import Parameters, between, centres, resample
from draf_dist.config.spec import Spec


class RandomCrop(Spec):
    """A window of `side` of the extent, the same along both axes, resampled to the size of the image.

    The region label is the cell of a grid x grid grid over the whole image in which the centre of the window lies, counted
    row by row. The cell is drawn first, uniformly, then the centre within it, as far as the window stays within the image: so
    no region is rare.
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

    @property
    def num_regions(self) -> int:
        """Classes of the region label."""
        return self.grid * self.grid

    def sample(self, keys: Tensor, size: tuple[int, int]) -> Parameters:
        """Side (B,); centre (B, 2), (y, x) in fractions of the extent; region int64 (B,) in [0, num_regions)."""
        draws = noise.uniform(keys, (4,))
        side = between(draws[:, 0], self.side)
        region = (draws[:, 1] * self.num_regions).long()
        cell = torch.stack([region // self.grid, region % self.grid], dim=1)
        low = torch.maximum(cell / self.grid, side[:, None] / 2)
        high = torch.minimum((cell + 1) / self.grid, 1 - side[:, None] / 2)
        return {"side": side, "centre": low + (high - low) * draws[:, 2:], "region": region}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The windows, (B, C, H, W) as the images."""
        side, centre = parameters["side"].view(-1, 1, 1), parameters["centre"]
        height, width = image.shape[-2:]
        y = centre[:, 0].view(-1, 1, 1) + side * (centres(height, image.device) - 0.5).view(1, -1, 1)
        x = centre[:, 1].view(-1, 1, 1) + side * (centres(width, image.device) - 0.5).view(1, 1, -1)
        shape = (image.shape[0], height, width)
        return resample(image, y.expand(shape), x.expand(shape))
