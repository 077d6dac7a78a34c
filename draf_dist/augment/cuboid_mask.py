"""Boxes taken out of the image."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import Fractions
from draf_dist.augment.transform import Parameters, Size, between, centres, on_axis
from draf_dist.config.spec import Spec


class CuboidMask(Spec):
    """1 to max_boxes boxes, all within the image, become 0, the mean of the training images; they may overlap.

    side: of a box along each axis, as a fraction of the extent, drawn for each axis.
    """

    kind: Literal["cuboid_mask"] = "cuboid_mask"
    max_boxes: int = Field(3, ge=1)
    side: Fractions = (0.1, 0.2)

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """low, high f32 (B, max_boxes, axes): corners in fractions of the extent; a box that is not used is empty."""
        axes = len(size)
        draws = noise.uniform(keys, (1 + 2 * axes * self.max_boxes,))
        used = torch.arange(self.max_boxes, device=keys.device) <= (draws[:, :1] * self.max_boxes).long()
        sides, places = draws[:, 1:].view(-1, 2, self.max_boxes, axes).unbind(dim=1)
        side = between(sides, self.side)
        low = places * (1 - side)
        return {"low": low, "high": torch.where(used[:, :, None], low + side, low)}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images without the pixels whose centre lies in a box."""
        low, high = parameters["low"], parameters["high"]
        return without_slices(image, low, high) if image.is_cpu else without_mask(image, low, high)


def without_slices(image: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Box by box, which touches few pixels: for the CPU, where asking for a box costs nothing."""
    ends = []
    for axis, length in enumerate(image.shape[2:]):
        at = centres(length, image.device)
        ends.append([(at < corner[:, :, axis, None]).sum(-1).tolist() for corner in (low, high)])
    kept = image.clone()
    for row in range(low.shape[0]):
        for box in range(low.shape[1]):
            kept[row][(slice(None), *(slice(start[row][box], stop[row][box]) for start, stop in ends))] = 0
    return kept


def without_mask(image: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The same with a few operations on all rows, on any device."""
    size = image.shape[2:]
    inside = torch.zeros((image.shape[0], *size), dtype=torch.bool, device=image.device)
    for box in range(low.shape[1]):
        within = torch.ones((), dtype=torch.bool, device=image.device)
        for axis, length in enumerate(size):
            at = centres(length, image.device)
            on = (low[:, box, axis, None] <= at) & (at < high[:, box, axis, None])
            within = within & on_axis(on, axis, size)
        inside |= within
    return torch.where(inside[:, None], 0.0, image)
