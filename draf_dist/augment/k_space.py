"""A faster scan: lines of k-space that were never measured."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.transform import Parameters, Size
from draf_dist.config.spec import Spec


class KSpaceUndersampling(Spec):
    """|F^-1(M F x)|, M a mask of the lines along one in-plane axis, shared by all slices and channels (spec 3.2).

    The ceil(fc N) lines in the centre are always measured, each other one with probability (N / R - Nc) / (N - Nc), clipped to
    [0, 1]; R is drawn from `accelerations`, fc from `centre_fractions`. An R of 1 measures everything.

    For intensities that are not negative, before standardisation: a magnitude would fold the signs of z-scores.

    phase_axis: the axis whose frequencies are lines, of the two in-plane axes (H, W).
    """

    kind: Literal["k_space"] = "k_space"
    accelerations: tuple[Annotated[float, Field(ge=1)], ...] = Field((2.0, 4.0, 6.0, 8.0), min_length=1)
    centre_fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.08, 0.04), min_length=1)
    phase_axis: Literal["height", "width"] = "width"

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Acceleration (B,); centre_fraction (B,); mask bool (B, N), frequency 0 at N // 2."""
        lines = size[self._axis]
        draws = noise.uniform(keys, (2 + lines,))
        which = (draws[:, 1] * len(self.centre_fractions)).long()
        acceleration = _choose(self.accelerations, (draws[:, 0] * len(self.accelerations)).long())
        # .07 * 100 is 7.0000000000000009, whose ceiling would be 8.
        centre = _choose([math.ceil(fraction * lines - 1e-9) for fraction in self.centre_fractions], which)
        probability = ((lines / acceleration - centre) / (lines - centre).clamp_min(1)).clamp(0, 1)
        place = torch.arange(lines, device=keys.device)
        first = (lines // 2 - centre // 2)[:, None]
        always = (first <= place) & (place < first + centre[:, None])
        return {
            "acceleration": acceleration,
            "centre_fraction": _choose(self.centre_fractions, which),
            "mask": always | (draws[:, 2:] < probability[:, None]),
        }

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The magnitude images. As M is constant along every other axis, one transform along the lines' own is all of F."""
        axis, lines = self._axis, image.shape[self._axis]
        measured = torch.fft.ifftshift(parameters["mask"], dim=1).to(image.dtype)
        mirrored = measured.flip(1).roll(1, dims=1)
        # The even part of M gives the real part of the image, the odd part the imaginary one: both are transforms of half a line.
        shape = (-1, *(lines // 2 + 1 if a == axis else 1 for a in range(1 - image.ndim, 0)))
        even, odd = ((part / 2)[:, : lines // 2 + 1].reshape(shape) for part in (measured + mirrored, measured - mirrored))
        spectrum = torch.fft.rfft(image, dim=axis)
        real: Tensor = torch.fft.irfft(spectrum * even, n=lines, dim=axis)
        imaginary = torch.fft.irfft(spectrum.mul_(odd * -1j), n=lines, dim=axis)
        return real.square_().add_(imaginary.square_()).sqrt_()

    @property
    def _axis(self) -> int:
        return -1 if self.phase_axis == "width" else -2


def _choose(options: tuple[float, ...] | list[int], index: Tensor) -> Tensor:
    return torch.tensor(options, device=index.device)[index]
