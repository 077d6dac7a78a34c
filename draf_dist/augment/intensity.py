"""Gamma: another exposure or display curve, with the same darkest and brightest value."""

import math
from typing import Literal

import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import Positive
from draf_dist.augment.transform import Parameters, Size, between, by_row, spatial
from draf_dist.config.spec import Spec


class Intensity(Spec):
    """low + (high - low) ((x - low) / (high - low))^gamma, low and high being the least and greatest value of each channel.

    A standardised image has negative values, of which there is no power; its range has none. As it commutes with x -> a x + b
    (a > 0), the result is that of a gamma before standardisation. gamma is log-uniform: as often darker as brighter.
    """

    kind: Literal["intensity"] = "intensity"
    gamma: Positive = (0.8, 1.25)

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Gamma (B,)."""
        low, high = self.gamma
        return {"gamma": between(noise.uniform(keys, ()), (math.log(low), math.log(high))).exp()}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images with their gamma; a constant channel stays as it is."""
        low, high = image.amin(spatial(image), keepdim=True), image.amax(spatial(image), keepdim=True)
        extent = high - low
        share = (image - low).div_(torch.where(extent > 0, extent, 1.0))
        return share.pow_(by_row(parameters["gamma"], image)).mul_(extent).add_(low)
