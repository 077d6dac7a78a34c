"""A raw 3-D image -> the grid of the schema: clipped, smoothed, resampled, padded or cropped about its centre, rounded."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.volumes import Voxels
from draf_dist.data.volumes_write import size_problem
from draf_dist.schema.modality import Sides, VolumeSpec
from draf_dist.schema.study import RawVolume
from draf_dist.schema.volume import MAX_VOXELS

Spacing = tuple[float, float, float]
# Spacings that differ by less are one and the same: headers round.
SAME_SPACING = 1e-3
# Full width at half maximum of a normal distribution, in standard deviations.
FWHM = 2 * math.sqrt(2 * math.log(2))


class UnfitVolumeError(Exception):
    """A volume that can't be stored as the schema says: reason is one of a few short words, detail says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def fitted(raw: RawVolume, spec: VolumeSpec) -> Voxels:
    """The volume on the grid of the schema, (C, D, H, W).

    In this order: NaN becomes `fill`; values outside `clip` become its bounds; along axes that get coarser, a normal distribution
    smooths (see `smoothing`); linear interpolation at the new voxel centres; then the centre of `shape` (or at least of `patch`)
    with `fill` around it; whole numbers are rounded to the nearest, half to even.

    Raises:
        UnfitVolumeError: it is no such volume, would be too large, holds values that the type can't, or is all one value.
    """
    if raw.voxels.ndim != 4 or raw.voxels.shape[0] != spec.channels or 0 in raw.voxels.shape:
        raise UnfitVolumeError("bad shape", f"{spec.name}: expected ({spec.channels}, D, H, W), found {raw.voxels.shape}")
    sides = new_sides(raw.voxels.shape[1:], raw.spacing_mm, spec.spacing_mm)
    if math.prod(sides) * spec.channels > MAX_VOXELS:
        found = f"{sides} voxels at {list(spec.spacing_mm)} mm"
        raise UnfitVolumeError("volume too large", f"{spec.name}: {found}, at most {MAX_VOXELS} are allowed")
    target = target_sides(sides, spec)
    if problem := size_problem((spec.channels, *target), spec):
        raise UnfitVolumeError("volume too large", f"{spec.name}: {problem}")
    planes = [boxed(resampled(_clean(plane, spec), raw.spacing_mm, spec.spacing_mm), target, spec.fill) for plane in raw.voxels]
    stacked: NDArray[Any] = np.stack(planes)
    return _stored(stacked, spec)


def new_sides(sides: tuple[int, ...], spacing_mm: Spacing, wanted_mm: Spacing) -> Sides:
    """Voxels along each axis on the new grid: the old extent over the new spacing, rounded, at least 1."""
    d, h, w = (
        side if same_spacing(old, new) else max(1, round(side * old / new))
        for side, old, new in zip(sides, spacing_mm, wanted_mm, strict=True)
    )
    return d, h, w


def resampled(
    plane: NDArray[np.int16] | NDArray[np.float32], spacing_mm: Spacing, wanted_mm: Spacing
) -> NDArray[np.int16] | NDArray[np.float32]:
    """One channel (D, H, W) on the new grid, float32, which shares the old one's centre; beyond its edge voxels as at the edge.

    Returned as it is where the spacing is the wanted one already.
    """
    factors = [1.0 if same_spacing(old, new) else new / old for old, new in zip(spacing_mm, wanted_mm, strict=True)]
    if factors == [1.0, 1.0, 1.0]:
        return plane
    sides = new_sides(plane.shape, spacing_mm, wanted_mm)
    # Seconds to import, and most releases have no volumes.
    from scipy import ndimage

    smooth = ndimage.gaussian_filter(
        plane.astype(np.float32, copy=False), [smoothing(factor) for factor in factors], mode="nearest"
    )
    # Voxel i of the new grid lies at factor * (i - (n' - 1) / 2) + (n - 1) / 2 of the old one.
    offsets = [(old - 1) / 2 - factor * (new - 1) / 2 for old, new, factor in zip(plane.shape, sides, factors, strict=True)]
    on_grid: NDArray[np.float32] = ndimage.affine_transform(
        smooth, np.array(factors), offset=offsets, output_shape=sides, output=np.float32, order=1, mode="nearest"
    )
    return on_grid


def smoothing(factor: float) -> float:
    """Standard deviation, in old voxels, of what keeps fine detail from folding into the coarser grid: 0 where it gets finer.

    A scanner's voxel sees about a normal distribution whose full width at half maximum is the spacing; this is what turns the old
    one into the new one: sqrt(new^2 - old^2) / 2.355 (Cardoso et al., MICCAI 2015).
    """
    return math.sqrt(max(0.0, factor**2 - 1)) / FWHM


def boxed(plane: NDArray[np.int16] | NDArray[np.float32], target: Sides, fill: int) -> NDArray[np.int16] | NDArray[np.float32]:
    """The middle of the volume in an array of the target's size, `fill` around it; of an odd rest the larger half at the end."""
    if plane.shape == target:
        return plane
    box = np.full(target, fill, dtype=plane.dtype)
    source, place = [], []
    for have, want in zip(plane.shape, target, strict=True):
        cut, pad = max(0, have - want) // 2, max(0, want - have) // 2
        length = min(have, want)
        source.append(slice(cut, cut + length))
        place.append(slice(pad, pad + length))
    box[tuple(place)] = plane[tuple(source)]
    return box


def same_spacing(one: float, other: float) -> bool:
    """Whether two spacings differ by no more than headers round."""
    return abs(one - other) <= SAME_SPACING * other


def target_sides(sides: Sides, spec: VolumeSpec) -> Sides:
    """Voxels along each axis of what is stored, of a volume that has so many at the new spacing."""
    if spec.shape is not None:
        return spec.shape
    d, h, w = (max(side, wanted) for side, wanted in zip(sides, spec.delivered, strict=True))
    return d, h, w


def _clean(plane: NDArray[np.int16] | NDArray[np.float32], spec: VolumeSpec) -> NDArray[np.int16] | NDArray[np.float32]:
    if plane.dtype == np.float32:
        plane = np.where(np.isnan(plane), np.float32(spec.fill), plane)
    if spec.clip is None:
        return plane
    low, high = spec.clip
    if plane.dtype == np.int16:
        low, high = max(low, -32768.0), min(high, 32767.0)
    clipped: NDArray[Any] = np.clip(plane, plane.dtype.type(low), plane.dtype.type(high))
    return clipped


def _stored(voxels: NDArray[np.int16] | NDArray[np.float32], spec: VolumeSpec) -> Voxels:
    low, high = float(voxels.min()), float(voxels.max())
    limit = np.iinfo(np.int16) if spec.dtype == "int16" else np.finfo(np.float16)
    if not (math.isfinite(low) and math.isfinite(high) and float(limit.min) <= low and high <= float(limit.max)):
        found = f"values from {low:g} to {high:g}"
        raise UnfitVolumeError("values out of range", f"{spec.name}: {found}, which {spec.dtype} can't hold; give `clip`")
    if low == high:
        raise UnfitVolumeError("blank image", f"{spec.name}: all voxels are {low:g}")
    if spec.dtype == "float16":
        return voxels.astype(np.float16)
    return np.rint(voxels).astype(np.int16, copy=False)
