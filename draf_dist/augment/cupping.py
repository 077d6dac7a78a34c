"""What beam hardening does to a round body, without the rays."""

from typing import Literal

import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import NotNegative
from draf_dist.augment.transform import Parameters, Size, between, by_row
from draf_dist.config.spec import Spec


class Cupping(Spec):
    """HU - b (1 - (rho / rho_max)^2) inside the body, slice by slice (spec 3.2): the cheap stand-in for `beam_hardening`.

    rho: the distance in pixels from the middle of the smallest box around the body; rho_max: of the body's farthest pixel.

    depth: b, what the middle of the body loses, HU, uniform. The range is ours. body_above: HU above which a pixel is body;
    air in the lungs is not.
    """

    kind: Literal["cupping"] = "cupping"
    depth: NotNegative = (0.0, 60.0)
    body_above: float = -500.0

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Depth (B,), HU."""
        return {"depth": between(noise.uniform(keys, ()), self.depth)}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images with their cups; a slice without a body stays as it is."""
        body = image > self.body_above
        y, x = _from_middle(body.any(-1))[..., :, None], _from_middle(body.any(-2))[..., None, :]
        squared = y.square() + x.square()
        farthest = torch.where(body, squared, 0.0).amax((-2, -1), keepdim=True)
        cup = (1 - squared / farthest.clamp_min(1)).mul_(by_row(parameters["depth"], image))
        return image - torch.where(body, cup, 0.0)


def _from_middle(occupied: Tensor) -> Tensor:
    """The distance of every place (.., n) from the middle between the first and the last that are occupied, bool (.., n)."""
    length = occupied.shape[-1]
    place = torch.arange(length, dtype=torch.float32, device=occupied.device)
    first = torch.where(occupied, place, float(length)).amin(-1, keepdim=True)
    last = torch.where(occupied, place, -1.0).amax(-1, keepdim=True)
    return place - (first + last) / 2
