"""Whole volumes segmented tile by tile: Dice, and whether the uncertainty of a voxel tells where the mask is wrong."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draf_dist.data.masks import BACKGROUND
from draf_dist.data.tiles import Tile
from draf_dist.data.whole_volumes import WholeVolume
from draf_dist.metrics.segmentation import ErrorDetection, Overlap
from draf_dist.models.link import Link
from draf_dist.models.streamed import streamed
from draf_dist.schema.batch import Batch, SegmentationTarget
from draf_dist.schema.label import IGNORED
from draf_dist.training.mask_scores import UNCERTAINTIES, StudyScore

# One pass after the other: logits (B, K, D, H, W) of a batch as loaded.
Passes = Callable[[Batch], Iterable[Tensor]]
SMALLEST_PROBABILITY = 1e-12
# Where errors are looked for. Background far from everything is right and certain, which makes them easy to find everywhere:
# in `structures` are voxels that mask or prediction do not call background, in `borders` those near one of the mask.
EVERYWHERE, STRUCTURES, BORDERS = ZONES = ("everywhere", "structures", "borders")
# A voxel is near a border if another structure is at most so many voxels away along every axis.
REACH = 2


@dataclass(frozen=True)
class TileMaps:
    """The own part of one tile. predicted: int64, the most probable structure of every voxel; uncertainty: by name, f32.

    truth: int64, IGNORED where nobody says; truth_probability: f32, what the truth was given (of an IGNORED voxel: anything). Both
    are None without a mask.
    """

    tile: Tile
    predicted: NDArray[np.int64]
    uncertainty: dict[str, NDArray[np.float32]]
    truth: NDArray[np.int64] | None
    truth_probability: NDArray[np.float32] | None


@dataclass(frozen=True)
class WholeMaps:
    """The tiles of a volume put together, each (D, H, W)."""

    predicted: NDArray[np.int64]
    uncertainty: dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class VolumeScore:
    """Of a volume with a mask. errors: by zone of ZONES, then by uncertainty; those of `everywhere` are the study's own."""

    study: StudyScore
    errors: dict[str, dict[str, ErrorDetection]]


@torch.no_grad()
def predicted_tiles(volume: WholeVolume, passes: Passes, link: Link, num_rows: int) -> Iterator[TileMaps]:
    """What a model says of a volume, every voxel once. Memory holds num_rows patches at a time, however many passes there are."""
    for tiles, batch in volume.batches(num_rows):
        found = streamed(passes(batch), link)
        mean, maps = found.probability.cpu(), found.uncertainties()
        predicted, uncertainty = mean.argmax(1).numpy(), {name: maps[name].cpu().numpy() for name in UNCERTAINTIES}
        truth, given = _truth(volume, batch, mean)
        for row, tile in enumerate(tiles):
            yield TileMaps(
                tile,
                predicted[row][tile.own],
                {name: values[row][tile.own] for name, values in uncertainty.items()},
                None if truth is None else truth[row][tile.own],
                None if given is None else given[row][tile.own],
            )


def _truth(volume: WholeVolume, batch: Batch, mean: Tensor) -> tuple[NDArray[np.int64] | None, NDArray[np.float32] | None]:
    if volume.mask is None:
        return None, None
    assert isinstance(batch.target, SegmentationTarget)  # whole_volumes makes no other
    mask = batch.target.mask
    return mask.numpy(), mean.gather(1, mask.clamp_min(0).unsqueeze(1))[:, 0].numpy()


def volume_score(volume: WholeVolume, tiles: Iterable[TileMaps], num_structures: int) -> VolumeScore:
    """The score of a volume with a mask: counts of its tiles, added up over all voxels of which the mask says something.

    Raises:
        ValueError: it has no mask.
    """
    if volume.mask is None:
        raise ValueError("a volume without a mask has no score")
    borders = near_borders(volume.mask[0])
    nothing = np.zeros(0, dtype=np.int64)
    overlap, surprise, num_known = Overlap.of(nothing, nothing, num_structures), 0.0, 0
    errors: dict[str, dict[str, ErrorDetection]] = {zone: {} for zone in ZONES}
    for maps in tiles:
        assert maps.truth is not None  # there is a mask
        assert maps.truth_probability is not None
        known = maps.truth != IGNORED
        overlap += Overlap.of(maps.predicted[known], maps.truth[known], num_structures)
        surprise -= float(np.log(maps.truth_probability[known].astype(np.float64).clip(SMALLEST_PROBABILITY)).sum())
        num_known += int(known.sum())
        is_structure = (maps.truth != BACKGROUND) | (maps.predicted != BACKGROUND)
        places = {EVERYWHERE: known, STRUCTURES: known & is_structure, BORDERS: known & borders[maps.tile.place]}
        for zone, place in places.items():
            _add_errors(errors[zone], maps, place)
    return VolumeScore(StudyScore(int(volume.row.uid[0]), surprise / max(num_known, 1), overlap, errors[EVERYWHERE]), errors)


def _add_errors(errors: dict[str, ErrorDetection], maps: TileMaps, place: NDArray[np.bool_]) -> None:
    """Adds the voxels of a tile that lie in a zone."""
    wrong = (maps.predicted != maps.truth)[place]
    for name, values in maps.uncertainty.items():
        found = ErrorDetection.of(values[place], wrong)
        errors[name] = errors[name] + found if name in errors else found


def near_borders(mask: NDArray[np.integer], reach: int = REACH) -> NDArray[np.bool_]:
    """Voxels with another structure at most `reach` voxels away along every axis; mask (D, H, W), IGNORED is no structure."""
    # Not part of every process that loads this file: it takes a moment to import.
    from scipy import ndimage

    side, known = 2 * reach + 1, mask != IGNORED
    highest = ndimage.maximum_filter(mask, side)  # IGNORED is below every structure
    lowest = ndimage.minimum_filter(np.where(known, mask, np.iinfo(mask.dtype).max), side)
    return np.asarray(known & (highest > lowest), dtype=np.bool_)


def whole_maps(volume: WholeVolume, tiles: Iterable[TileMaps]) -> WholeMaps:
    """The maps of a whole volume, to be looked at or stored."""
    predicted, uncertainty = np.zeros(volume.shape, dtype=np.int64), dict[str, NDArray[np.float32]]()
    for maps in tiles:
        predicted[maps.tile.place] = maps.predicted
        for name, values in maps.uncertainty.items():
            uncertainty.setdefault(name, np.zeros(volume.shape, dtype=np.float32))[maps.tile.place] = values
    return WholeMaps(predicted, uncertainty)
