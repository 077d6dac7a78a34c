"""A volume covered by patches of one size, so that every voxel is one patch's own: what is counted by patch adds up exactly."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from draf_dist.schema.modality import Sides


@dataclass(frozen=True)
class Tile:
    """One patch of a cover. start: (D, H, W), where it begins in the volume.

    own: the part of the patch, in its own indices, that no other tile has.
    """

    start: Sides
    own: tuple[slice, slice, slice]

    @property
    def place(self) -> tuple[slice, slice, slice]:
        """Where in the volume its own part lies."""
        d, h, w = (slice(first + part.start, first + part.stop) for first, part in zip(self.start, self.own, strict=True))
        return d, h, w


def cover(shape: Sequence[int], patch: Sequence[int], overlap: int = 0) -> tuple[Tile, ...]:
    """The fewest patches (D, H, W) that cover a volume, spread evenly, neighbours sharing at least `overlap` voxels.

    What two share is halved between them: every voxel is predicted by a patch that sees it as far from its edge as can be.

    Raises:
        ValueError: a patch that is larger than the volume, or an overlap that is not below its sides.
    """
    if any(wanted > side for wanted, side in zip(patch, shape, strict=True)) or not 0 <= overlap < min(patch):
        raise ValueError(f"patches of {list(patch)} voxels that share {overlap} do not cover {list(shape)}")
    axes = [_along(side, wanted, overlap) for side, wanted in zip(shape, patch, strict=True)]
    return tuple(Tile((d[0], h[0], w[0]), (d[1], h[1], w[1])) for d, h, w in itertools.product(*axes))


def _along(side: int, wanted: int, overlap: int) -> list[tuple[int, slice]]:
    """Start and own part of every patch along one axis."""
    # An axis that one patch fills needs no second one.
    count = 1 if side == wanted else -(-(side - overlap) // (wanted - overlap))
    starts = [number * (side - wanted) // max(count - 1, 1) for number in range(count)]
    bounds = [0, *((before + wanted + after) // 2 for before, after in itertools.pairwise(starts)), side]
    return [
        (start, slice(low - start, high - start)) for start, (low, high) in zip(starts, itertools.pairwise(bounds), strict=True)
    ]
