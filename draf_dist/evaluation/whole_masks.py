"""Whole volumes segmented tile by tile: Dice, and whether the uncertainty of a voxel tells where the mask is wrong."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


def volume_score(volume: WholeVolume, tiles: Iterable[TileMaps], num_structures: int) -> StudyScore:
    """The score of a volume with a mask: counts of its tiles, added up over all voxels of which the mask says something.

    Raises:
        ValueError: it has no mask.
    """
    nothing = np.zeros(0, dtype=np.int64)
    overlap, errors = Overlap.of(nothing, nothing, num_structures), dict[str, ErrorDetection]()
    surprise, num_known = 0.0, 0
    for maps in tiles:
        if maps.truth is None or maps.truth_probability is None:
            raise ValueError("a volume without a mask has no score")
        known = maps.truth != IGNORED
        predicted, truth = maps.predicted[known], maps.truth[known]
        overlap += Overlap.of(predicted, truth, num_structures)
        surprise -= float(np.log(maps.truth_probability[known].astype(np.float64).clip(SMALLEST_PROBABILITY)).sum())
        num_known += len(truth)
        for name, values in maps.uncertainty.items():
            found = ErrorDetection.of(values[known], predicted != truth)
            errors[name] = errors[name] + found if name in errors else found
    return StudyScore(int(volume.row.uid[0]), surprise / max(num_known, 1), overlap, errors)


def whole_maps(volume: WholeVolume, tiles: Iterable[TileMaps]) -> WholeMaps:
    """The maps of a whole volume, to be looked at or stored."""
    predicted, uncertainty = np.zeros(volume.shape, dtype=np.int64), dict[str, NDArray[np.float32]]()
    for maps in tiles:
        predicted[maps.tile.place] = maps.predicted
        for name, values in maps.uncertainty.items():
            uncertainty.setdefault(name, np.zeros(volume.shape, dtype=np.float32))[maps.tile.place] = values
    return WholeMaps(predicted, uncertainty)
