"""What of an image or volume tells how badly it is corrupted: moments, noise, gradient, frequency bands, by channel [ours].

Pixels themselves can't serve: a PCA of them models anatomy, and noise of .1 is lost in it. These few numbers hardly depend on what
is seen, and strongly on noise (high bands rise), resolution (they fall) and coding (values repeat, blocks begin to show).
"""

import torch
from torch import Tensor
from torch.nn import functional

# mean, log variance, skewness, log energy of the gradient, log noise, log kurtosis of the finest detail.
MOMENTS = 6
# Halvings of the resolution, where the image has that many.
MAX_BANDS = 4
# The side of the blocks that JPEG codes, and the smallest side on which there is more than one border of them.
BLOCK, LEAST_BLOCKED = 8, 24
# Of the unit variance of a normalised image; the log of less says nothing.
_LEAST_ENERGY, _LEAST_SIZE = 1e-6, 1e-3
_THUMBNAIL_2D, _THUMBNAIL_3D = 8, 4


def num_bands(sides: tuple[int, ...]) -> int:
    """How often all sides can be halved, at most 4: of 1 pixel never, of 12 pixels three times."""
    return min(MAX_BANDS, min(sides).bit_length() - 1)


def has_blocks(sides: tuple[int, ...]) -> bool:
    """Whether it is a plane of at least 24 x 24 pixels, on which borders of blocks can be told from the rest."""
    return len(sides) == 2 and min(sides) >= LEAST_BLOCKED


def num_statistics(channels: int, sides: tuple[int, ...]) -> int:
    """How many numbers `image_statistics` gives."""
    return channels * (MOMENTS + has_blocks(sides) + num_bands(sides))


def image_statistics(image: Tensor) -> Tensor:
    """Statistics (B, D) of normalised images (B, C, *sides), of two or three dimensions; D is `num_statistics`.

    By channel: mean; log variance; skewness; log of the mean squared difference of neighbours, summed over axes; of the finest
    detail d, differences along all axes at once: log of the median of |d|, which sees the noise and not the edges (Donoho and
    Johnstone 1994), and log of the kurtosis; the log of how much larger squared differences are across borders of 8 x 8 blocks
    (planes of at least 24 x 24); log energies of L = num_bands frequency bands. Logs are natural and bounded below.
    """
    sides, axes = tuple(image.shape[2:]), tuple(range(2, image.dim()))
    mean = image.mean(axes)
    centred = image - mean.view(*mean.shape, *(1 for _ in axes))
    variance = centred.square().mean(axes)
    skewness = centred.pow(3).mean(axes) / variance.clamp_min(_LEAST_ENERGY).pow(1.5)
    columns = [mean, _log(variance), skewness, _log(gradient_energy(image)), *detail(image)]
    columns += [blockiness(image)] if has_blocks(sides) else []
    columns += [_log(band) for band in band_energies(image, num_bands(sides))]
    return torch.stack(columns, dim=-1).flatten(1)


def detail(image: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the median size, and of the kurtosis, of differences along all axes longer than 1 at once; both (B, C)."""
    for axis in range(2, image.dim()):
        image = image.diff(dim=axis) if image.shape[axis] > 1 else image
    flat = image.flatten(2)
    square = flat.square().mean(-1)
    kurtosis = flat.pow(4).mean(-1) / square.clamp_min(_LEAST_ENERGY).square()
    return flat.abs().median(-1).values.clamp_min(_LEAST_SIZE).log(), _log(kurtosis)


def blockiness(image: Tensor) -> Tensor:
    """Log of the energy of differences across borders of 8 x 8 blocks over that of all others, of planes (B, C, H, W): (B, C)."""
    across, within = [], []
    for axis in (2, 3):
        square = image.diff(dim=axis).square()
        border = torch.arange(square.shape[axis], device=image.device) % BLOCK == BLOCK - 1
        across.append(square.movedim(axis, -1)[..., border].mean((2, 3)))
        within.append(square.movedim(axis, -1)[..., ~border].mean((2, 3)))
    return _log(across[0] + across[1]) - _log(within[0] + within[1])


def gradient_energy(image: Tensor) -> Tensor:
    """Mean squared difference of neighbours, summed over axes longer than 1: (B, C)."""
    axes = tuple(range(2, image.dim()))
    parts = [image.diff(dim=axis).square().mean(axes) for axis in axes if image.shape[axis] > 1]
    return torch.stack(parts).sum(0) if parts else torch.zeros(image.shape[:2], device=image.device)


def band_energies(image: Tensor, bands: int) -> list[Tensor]:
    """Energy (B, C) between one resolution and the next, halved one, finest first.

    Averages over blocks are an orthogonal projection, so what it takes away is mean x_j^2 - mean x_(j+1)^2 where x_(j+1) are the
    averages of x_j (an odd last row is left out of both). White noise of variance 1 has (1 - 1/4) / 4^j in band j of a plane.
    """
    pool = functional.avg_pool2d if image.dim() == 4 else functional.avg_pool3d
    found = []
    for _ in range(bands):
        coarser = pool(image, 2)
        whole = image
        for axis in range(2, image.dim()):
            whole = whole.narrow(axis, 0, 2 * coarser.shape[axis])
        found.append((_power(whole) - _power(coarser)).clamp_min(0.0))
        image = coarser
    return found


def thumbnail(image: Tensor) -> Tensor:
    """What an image shows, small: averages over 8 x 8 areas of a plane, 4 x 4 x 4 of a volume, as (B, D)."""
    if image.dim() == 4:
        return functional.adaptive_avg_pool2d(image, _THUMBNAIL_2D).flatten(1)
    return functional.adaptive_avg_pool3d(image, _THUMBNAIL_3D).flatten(1)


def thumbnail_size(channels: int, dimensions: int) -> int:
    """D of `thumbnail`, of an image of 2 or 3 dimensions."""
    return channels * (_THUMBNAIL_2D**2 if dimensions == 2 else _THUMBNAIL_3D**3)


def _power(image: Tensor) -> Tensor:
    return image.square().mean(tuple(range(2, image.dim())))


def _log(energy: Tensor) -> Tensor:
    return energy.clamp_min(_LEAST_ENERGY).log()
