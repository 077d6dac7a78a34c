"""Parallel projections of slices, and the slices back from them: of many slices at once, on any device.

All slices of a batch are the channels of one image, so the places and weights of an angle are computed once for all of them.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional


def project(image: Tensor, *, angles: int, pixel: float) -> Tensor:
    """Line integrals of slices (N, H, W) over `angles` directions in [0, pi): (N, angles, detectors).

    Detectors are one pixel apart, symmetric about the centre of the slice, and reach over its diagonal. Beyond the slice is
    nothing. pixel: its side, in the unit of length in which the values of the image are densities.
    """
    height, width = image.shape[-2:]
    num = detectors(height, width)
    place = torch.arange(num, dtype=torch.float32, device=image.device) - (num - 1) / 2
    across, along = place[:, None], place
    rays = []
    for cos, sin in _directions(angles):
        x, y = across * cos - along * sin, across * sin + along * cos
        grid = torch.stack([x * (2 / width), y * (2 / height)], dim=-1)
        rays.append(functional.grid_sample(image[None], grid[None], padding_mode="zeros", align_corners=False)[0].sum(-1))
    return torch.stack(rays, dim=1).mul_(pixel)


def filtered_back_projection(sinogram: Tensor, height: int, width: int, *, pixel: float) -> Tensor:
    """Slices (N, height, width) from what `project` gives: ramp filter, then the mean over angles (Kak and Slaney 1988, 3.3)."""
    filtered = ramp_filter(sinogram, pixel)
    angles, num = sinogram.shape[1:]
    y, x = (torch.arange(n, dtype=torch.float32, device=sinogram.device) - (n - 1) / 2 for n in (height, width))
    total = sinogram.new_zeros((sinogram.shape[0], height, width))
    for index, (cos, sin) in enumerate(_directions(angles)):
        place = (x * cos + y[:, None] * sin) * (2 / num)
        grid = torch.stack([place, torch.zeros_like(place)], dim=-1)
        row = filtered[None, :, index, None]
        total += functional.grid_sample(row, grid[None], padding_mode="zeros", align_corners=False)[0]
    return total.mul_(math.pi / angles)


def ramp_filter(sinogram: Tensor, pixel: float) -> Tensor:
    """Every projection (.., detectors) convolved with the band-limited ramp of Ramachandran and Lakshminarayanan.

    Its values in space, 1/4 at 0 and -1 / (pi n)^2 at odd n, and not |f| sampled in frequency, which would lose the mean.
    """
    num = sinogram.shape[-1]
    length = 2 * num
    n = torch.fft.fftfreq(length, d=1 / length, device=sinogram.device)
    kernel = torch.where(n.remainder(2) == 1, -1 / (math.pi * n).square().clamp_min(1), 0.0)
    kernel[0] = 0.25
    response = torch.fft.rfft(kernel).real / pixel
    filtered: Tensor = torch.fft.irfft(torch.fft.rfft(sinogram, n=length) * response, n=length)
    return filtered[..., :num]


def detectors(height: int, width: int) -> int:
    """How many detectors see a whole slice."""
    return math.ceil(math.hypot(height, width))


def _directions(angles: int) -> Iterator[tuple[float, float]]:
    """Cosine and sine of every angle."""
    for index in range(angles):
        angle = math.pi * index / angles
        yield math.cos(angle), math.sin(angle)
