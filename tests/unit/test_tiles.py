"""Covers of volumes: every voxel once, whatever the sizes."""

import numpy as np
import pytest

from draf_dist.data.tiles import cover

SHAPES = [(8, 8, 8), (9, 8, 20), (17, 23, 8), (31, 40, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("overlap", [0, 1, 3, 7])
def test_every_voxel_is_one_tiles_own(shape: tuple[int, int, int], overlap: int) -> None:
    seen = np.zeros(shape, dtype=int)
    for tile in cover(shape, (8, 8, 8), overlap):
        assert all(0 <= first <= side - 8 for first, side in zip(tile.start, shape, strict=True))
        assert all(0 <= part.start < part.stop <= 8 for part in tile.own)
        seen[tile.place] += 1
    assert (seen == 1).all()


def test_a_cover_takes_no_more_patches_than_it_must() -> None:
    assert len(cover((8, 8, 8), (8, 8, 8), 7)) == 1
    assert len(cover((16, 9, 8), (8, 8, 8))) == 2 * 2
    assert len(cover((16, 8, 8), (8, 8, 8), 1)) == 3
    assert [tile.start[0] for tile in cover((20, 8, 8), (8, 8, 8), 2)] == [0, 6, 12]


def test_what_neighbours_share_is_halved() -> None:
    first, second = cover((12, 8, 8), (8, 8, 8), 4)
    assert (first.own[0], second.own[0]) == (slice(0, 6), slice(2, 8))
    assert (first.place[0], second.place[0]) == (slice(0, 6), slice(6, 12))


@pytest.mark.parametrize(("shape", "overlap"), [((8, 7, 8), 0), ((9, 9, 9), 8), ((9, 9, 9), -1)])
def test_a_cover_that_can_not_be_is_refused(shape: tuple[int, int, int], overlap: int) -> None:
    with pytest.raises(ValueError, match="do not cover"):
        cover(shape, (8, 8, 8), overlap)
