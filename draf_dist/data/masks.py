"""Masks of volumes: onto the grid that the volume got, by nearest neighbour; and whether a stored one holds structures alone."""

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.volumes import Voxels
from draf_dist.data.volumes_fit import Spacing, UnfitVolumeError, boxed, new_sides, same_spacing, target_sides
from draf_dist.schema.label import IGNORED
from draf_dist.schema.modality import VolumeSpec
from draf_dist.schema.study import RawVolume

BACKGROUND = 0
# Places this close to the middle of two voxels, in voxels, are in the middle: spacings are decimal fractions.
TIE = 1e-6


def fitted_mask(mask: RawVolume, image: RawVolume, spec: VolumeSpec, num_structures: int) -> NDArray[np.int16]:
    """The mask on the grid that `fitted` gives its image, int16 (1, D, H, W): no value that was not there before.

    Every voxel takes the nearest of the old ones; of two equally near ones that of the lower index. Around the scan is background.

    Raises:
        UnfitVolumeError: it has other voxels than its image, or holds what is no structure.
    """
    if mask.voxels.dtype != np.int16 or mask.voxels.shape != (1, *image.voxels.shape[1:]):
        found = f"{mask.voxels.dtype} {mask.voxels.shape}"
        raise UnfitVolumeError("mask off its image", f"{spec.name}: expected the voxels of its image, found {found}")
    voxels = mask.voxels[0].astype(np.int16, copy=False)
    if problem := mask_problem(voxels, num_structures):
        raise UnfitVolumeError("bad mask", f"{spec.name}: {problem}")
    # The image's own spacing: the header of a mask may round otherwise, and the grids must be one.
    sides = new_sides(voxels.shape, image.spacing_mm, spec.spacing_mm)
    plane = nearest(voxels, image.spacing_mm, spec.spacing_mm)
    return np.ascontiguousarray(boxed(plane, target_sides(sides, spec), BACKGROUND)[None], dtype=np.int16)


def nearest(plane: NDArray[np.int16], spacing_mm: Spacing, wanted_mm: Spacing) -> NDArray[np.int16]:
    """A plane (D, H, W) on the grid of `resampled`, which shares the old one's centre, every voxel the nearest of the old ones."""
    sides = new_sides(plane.shape, spacing_mm, wanted_mm)
    axes = zip(plane.shape, sides, spacing_mm, wanted_mm, strict=True)
    taken = [_nearest(have, want, 1.0 if same_spacing(old, new) else new / old) for have, want, old, new in axes]
    return plane[np.ix_(*taken)]


def _nearest(have: int, want: int, factor: float) -> NDArray[np.int64]:
    place = factor * (np.arange(want) - (want - 1) / 2) + (have - 1) / 2
    return np.asarray(np.clip(np.ceil(place - 0.5 - TIE), 0, have - 1), dtype=np.int64)


def mask_problem(voxels: Voxels, num_structures: int) -> str | None:
    """What is wrong with the values of a mask; None where nothing is."""
    low, high = int(voxels.min()), int(voxels.max())
    if low < IGNORED or high >= num_structures:
        return f"values from {low} to {high} in a mask of {num_structures} structures"
    return None
