"""Detector noise."""

from typing import Literal

from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import NotNegative
from draf_dist.augment.transform import Parameters, Size, between, by_row
from draf_dist.config.spec import Spec


class GaussianNoise(Spec):
    """x + sigma eps, eps iid N(0, 1) per pixel, sigma uniform, in standard deviations of the training images."""

    kind: Literal["gaussian_noise"] = "gaussian_noise"
    sigma: NotNegative = (0.0, 0.1)

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Sigma (B,); key int64 (B,), of which eps is a function."""
        return {"sigma": between(noise.uniform(keys, ()), self.sigma), "key": keys}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images with their noise."""
        eps = noise.normal(parameters["key"], tuple(image.shape[1:]))
        return eps.to(image.dtype).mul_(by_row(parameters["sigma"], image)).add_(image)
