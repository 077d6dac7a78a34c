"""The noise of magnitude images."""

from typing import Literal

from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import NotNegative
from draf_dist.augment.transform import Parameters, Size, between, by_row, spatial
from draf_dist.config.spec import Spec


class RicianNoise(Spec):
    """sqrt((x + s e1)^2 + (s e2)^2), e1 and e2 iid N(0, 1) per voxel: the magnitude of a complex image with Gaussian noise.

    (Gudbjartsson and Patz 1995.) s is sigma times the greatest value of each channel, because a scanner's numbers have no
    unit; sigma is uniform, and 1 / sigma the signal-to-noise ratio where the image is brightest. The range is ours. For
    intensities that are not negative, before standardisation.
    """

    kind: Literal["rician_noise"] = "rician_noise"
    sigma: NotNegative = (0.0, 0.04)

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Sigma (B,); key int64 (B,), of which e1 and e2 are a function."""
        return {"sigma": between(noise.uniform(keys, ()), self.sigma), "key": keys}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The magnitude images."""
        scale = by_row(parameters["sigma"], image) * image.amax(spatial(image), keepdim=True)
        real, imaginary = noise.normal(parameters["key"], (2, *image.shape[1:])).to(image.dtype).unbind(dim=1)
        real.mul_(scale).add_(image)
        return real.square_().add_(imaginary.mul_(scale).square_()).sqrt()
