"""The mask of a volume: a NIfTI file on the very voxels of its image, its values turned to indices of structures."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from draf_dist.schema.label import IGNORED
from draf_dist.schema.study import RawVolume
from draf_dist.sources.card_segmentation import LARGEST_VALUE, SegmentationCard
from draf_dist.sources.images import ImageError
from draf_dist.sources.volume_files import load_nifti

# Headers are rounded. By more than this share of a voxel no corner of a mask may lie off its image.
MAX_SHIFT = 0.1
LISTED_VALUES = 8


def load_mask(raw: Path, file: str, card: SegmentationCard, image: RawVolume) -> RawVolume | None:
    """The mask at a path relative to the raw folder, int16 (1, D, H, W); None where there is no such file.

    image: the volume that was outlined, as a source gives it. Both may be stored in any orientation: they are compared as they
    lie in the patient.

    Raises:
        ImageError: it can't be read or placed, lies on other voxels than its image, or has a value of which the card says nothing.
    """
    mask = load_nifti(raw, file)
    if mask is None:
        return None
    _check_place(mask, image)
    return RawVolume(structures(mask.voxels, card), mask.spacing_mm, mask.affine)


def structures(voxels: NDArray[np.int16] | NDArray[np.float32], card: SegmentationCard) -> NDArray[np.int16]:
    """Index of the structure of every voxel, or IGNORED; the same shape.

    Raises:
        ImageError: a value that is no whole number from 0 on, or one of which the card says nothing.
    """
    found, place = np.unique(voxels, return_inverse=True)
    if not (np.isfinite(found).all() and (found == np.rint(found)).all() and found[0] >= 0 and found[-1] <= LARGEST_VALUE):
        raise ImageError("bad mask", f"a mask holds whole numbers from 0 to {LARGEST_VALUE}; is this an image, or probabilities?")
    values = found.astype(np.int64).tolist()
    known = card.classes()
    if card.others is None and (strange := [value for value in values if value not in known]):
        raise ImageError("unmapped value", _unmapped(strange))
    other = IGNORED if card.others == "ignored" else 0
    index = np.array([known.get(value, other) for value in values], dtype=np.int16)
    return index[place].reshape(voxels.shape)


def _unmapped(values: list[int]) -> str:
    listed = ", ".join(map(str, values[:LISTED_VALUES]))
    more = f" and {len(values) - LISTED_VALUES} more" if len(values) > LISTED_VALUES else ""
    return (
        f"the mask has {listed}{more}, of which the card says nothing; list them as a structure or as `background`, "
        "or say `others: background` or `others: ignored`"
    )


def _check_place(mask: RawVolume, image: RawVolume) -> None:
    if mask.voxels.shape[1:] == image.voxels.shape[1:] and _shift(mask, image) <= MAX_SHIFT:
        return
    remedy = "a mask must have the voxels of its image: resample it to them (nearest neighbour) before export"
    raise ImageError("mask off its image", f"the mask has {_described(mask)}, its image {_described(image)}; {remedy}")


def _shift(mask: RawVolume, image: RawVolume) -> float:
    """How far apart the two put a corner at most, in voxels of the smallest spacing."""
    assert mask.affine is not None  # what was read from files has one
    assert image.affine is not None
    ends = [(0, side - 1) for side in image.voxels.shape[1:]]
    corners = np.array([(d, h, w, 1) for d in ends[0] for h in ends[1] for w in ends[2]])
    apart = corners @ (mask.affine - image.affine).T
    return float(np.sqrt((apart**2).sum(axis=1)).max()) / min(image.spacing_mm)


def _described(volume: RawVolume) -> str:
    assert volume.affine is not None
    sides = " x ".join(map(str, volume.voxels.shape[1:]))
    rows = "; ".join(" ".join(f"{value:.4g}" for value in row) for row in volume.affine)
    return f"{sides} voxels (D, H, W) and the affine [{rows}]"
