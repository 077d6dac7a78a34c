"""X-ray quanta are counted, and few of them pass where the body is dense."""

import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import Positive
from draf_dist.augment.transform import Parameters, Size, between, by_row
from draf_dist.config.spec import Spec


class PoissonNoise(Spec):
    """A radiograph whose quanta were counted again: x' = (white / a) ln(photons / N), N ~ Poisson(photons exp(-a x / white)).

    Grey values are taken as attenuation (Beer-Lambert), 0 being air and white the densest, of which `contrast` = exp(a) times
    fewer quanta come through: so dense parts are noisier. The spec names Poisson noise alone; this reading and the ranges are
    ours. N is at least 1. For stored grey values, before standardisation.

    photons: the mean count where nothing is in the way, log-uniform. white: the greatest stored value.
    """

    kind: Literal["poisson_noise"] = "poisson_noise"
    photons: Positive = (2000.0, 20000.0)
    contrast: float = Field(100.0, gt=1)
    white: float = Field(255.0, gt=0)

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Photons (B,); key int64 (B,), of which the counts are a function."""
        low, high = self.photons
        photons = between(noise.uniform(keys, (1,))[:, 0], (math.log(low), math.log(high))).exp()
        return {"photons": photons, "key": keys}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images with their noise."""
        a = math.log(self.contrast)
        photons = by_row(parameters["photons"], image)
        counts = poisson_counts((image * (-a / self.white)).exp_().mul_(photons), parameters["key"])
        return counts.clamp_min_(1).div_(photons).log_().mul_(-self.white / a)


def poisson_counts(mean: Tensor, keys: Tensor) -> Tensor:
    """Poisson counts of the means f32 (B, ..), as functions of keys (B,) and the element: whole numbers.

    The quantile by Cornish and Fisher's expansion about a normal one, m + s z + (z^2 - 1) / 6 - (z^3 + 2 z) / (72 s), s^2 = m,
    rounded: off by one now and then. For means of 5 and more.
    """
    z = noise.normal(keys, tuple(mean.shape[1:])).to(mean.dtype)
    s = mean.sqrt()
    squared = z.square()
    third = (squared + 2).mul_(z).div_(s.clamp_min(1)).mul_(-1 / 72)
    counts = squared.sub_(1).mul_(1 / 6).add_(third).add_(mean).add_(s.mul_(z))
    return counts.round_().clamp_min_(0)
