"""A k-space that ends too early: ripples beside every edge."""

from typing import Literal

import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import Fractions
from draf_dist.augment.transform import Parameters, Size, between
from draf_dist.config.spec import Spec


class GibbsRinging(Spec):
    """|F^-1(M F x)|, M keeping the lowest frequencies of both in-plane axes, a rectangle as a scanner measures it.

    kept: the share of k-space along either axis, uniform; 1 keeps everything. For intensities that are not negative, before
    standardisation. The range is ours (the spec names the operation alone).
    """

    kind: Literal["gibbs_ringing"] = "gibbs_ringing"
    kept: Fractions = (0.5, 0.9)

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Kept (B,)."""
        return {"kept": between(noise.uniform(keys, ()), self.kept)}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The magnitude images."""
        height, width = image.shape[-2:]
        # In cycles per pixel, up to one half.
        highest = parameters["kept"][:, None] / 2
        rows = torch.fft.fftfreq(height, device=image.device).abs() <= highest
        columns = torch.fft.rfftfreq(width, device=image.device) <= highest
        mask = (rows[:, :, None] & columns[:, None, :]).to(image.dtype)
        spectrum = torch.fft.rfft2(image).mul_(mask.view(-1, *(1 for _ in image.shape[1:-2]), *mask.shape[1:]))
        lowered: Tensor = torch.fft.irfft2(spectrum, s=(height, width))
        return lowered.abs_()
