"""Resampling, padding and cropping against closed forms."""

import numpy as np
import pytest

from draf_dist.data.volumes_fit import UnfitVolumeError, boxed, fitted, new_sides, resampled, smoothing
from draf_dist.schema.modality import VolumeSpec
from draf_dist.schema.study import RawVolume


def spec(**changes: object) -> VolumeSpec:
    return VolumeSpec(**{"name": "ct", "spacing_mm": (2, 1, 1), "patch": (4, 4, 4), "chunk": (16, 16, 16), **changes})


def ramp(sides: tuple[int, int, int], spacing: tuple[float, float, float], slopes: tuple[float, float, float]) -> np.ndarray:
    """A linear function of the place in mm, about the centre of the grid."""
    places = [(np.arange(side) - (side - 1) / 2) * step for side, step in zip(sides, spacing, strict=True)]
    grid = np.meshgrid(*places, indexing="ij")
    return sum(slope * place for slope, place in zip(slopes, grid, strict=True)).astype(np.float32)


@pytest.mark.parametrize("wanted", [(1.0, 1.0, 1.0), (2.0, 0.5, 0.8), (4.0, 2.5, 0.3)])
def test_a_linear_function_of_place_stays_one(wanted: tuple[float, float, float]) -> None:
    # Smoothing is symmetric and interpolation linear: both leave it as it is, but at the edge.
    sides, spacing, slopes = (24, 30, 36), (2.0, 1.0, 0.7), (3.0, -2.0, 5.0)
    found = resampled(ramp(sides, spacing, slopes), spacing, wanted)
    assert found.shape == new_sides(sides, spacing, wanted)
    expected = ramp(found.shape, wanted, slopes)
    margins = [
        slice(int(np.ceil(5 * step / new)) + 1, -int(np.ceil(5 * step / new)) - 1)
        for step, new in zip(spacing, wanted, strict=True)
    ]
    margins = [
        inside if side > 14 else slice(side // 2 - 1, side // 2 + 1) for inside, side in zip(margins, found.shape, strict=True)
    ]
    assert np.allclose(found[tuple(margins)], expected[tuple(margins)], atol=0.02)


def test_twice_as_fine_is_the_mean_of_neighbours() -> None:
    line = np.array([0, 8, 4], dtype=np.float32).reshape(3, 1, 1)
    # New centres lie a quarter of a voxel beside the old ones; beyond the edge it goes on as at the edge.
    assert resampled(line, (2, 1, 1), (1, 1, 1)).ravel().tolist() == [0, 2, 6, 7, 5, 4]


def test_what_is_finer_than_the_new_grid_does_not_fold_into_it() -> None:
    stripes = np.where(np.arange(48) % 2, 100, -100).astype(np.float32).reshape(48, 1, 1)
    found = resampled(stripes, (1, 1, 1), (3, 1, 1))[2:-2]
    assert np.abs(found).max() < 10  # every third voxel alone would be 100, -100, 100, ...
    assert smoothing(1.0) == smoothing(0.5) == 0
    assert smoothing(2.0) == pytest.approx(np.sqrt(3) / 2.3548, rel=1e-4)


def test_the_centre_stays_the_centre() -> None:
    points = np.zeros((9, 9, 9), np.float32)
    points[4, 4, 4] = 1000
    for wanted in [(1.0, 1.0, 1.0), (0.6, 0.9, 3.0), (2.0, 2.0, 2.0)]:
        found = resampled(points, (1, 1, 1), wanted)
        for axis, side in enumerate(found.shape):
            mass = found.sum(axis=tuple(other for other in range(3) if other != axis))
            assert (mass * (np.arange(side) - (side - 1) / 2)).sum() / mass.sum() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("have", "want", "expected"), [(5, 2, [1, 2]), (4, 2, [1, 2]), (2, 5, [-1, 0, 1, -1, -1]), (3, 4, [0, 1, 2, -1])]
)
def test_of_an_odd_rest_the_larger_half_is_at_the_end(have: int, want: int, expected: list[int]) -> None:
    line = np.arange(have, dtype=np.int16).reshape(have, 1, 1)
    assert boxed(line, (want, 1, 1), -1).ravel().tolist() == expected


def test_clipping_comes_before_interpolation_and_nan_is_outside() -> None:
    voxels = np.array([3000, 0, np.nan, -50], dtype=np.float32).reshape(1, 4, 1, 1)
    found = fitted(
        RawVolume(voxels, (2, 1, 1)), spec(clip=(-100, 1000), fill=-80, shape=(8, 1, 1), spacing_mm=(1, 1, 1), patch=None)
    )
    # Quarter steps between 1000, 0, -80, -50, rounded half to even.
    assert found.ravel().tolist() == [1000, 750, 250, -20, -60, -72, -58, -50]


def test_volumes_of_any_shape_have_room_for_a_patch() -> None:
    voxels = np.arange(2 * 9 * 3, dtype=np.int16).reshape(1, 2, 9, 3)
    found = fitted(RawVolume(voxels, (2, 1, 1)), spec(patch=(4, 4, 4), fill=-7))
    assert found.shape == (1, 4, 9, 4)
    assert np.array_equal(found[:, 1:3, :, 0:3], voxels)
    assert (found[:, 0] == -7).all()


def test_what_needs_no_change_gets_none() -> None:
    voxels = np.random.default_rng(0).integers(-900, 900, (1, 8, 8, 8)).astype(np.int16)
    assert np.array_equal(fitted(RawVolume(voxels, (2.0005, 1, 0.9995)), spec()), voxels)
    whole = voxels.astype(np.float32)
    assert np.array_equal(fitted(RawVolume(whole, (2, 1, 1)), spec(dtype="float16")), voxels.astype(np.float16))


@pytest.mark.parametrize(
    ("voxels", "changes", "reason"),
    [
        (np.full((1, 4, 4, 4), 5, np.int16), {}, "blank image"),
        (np.full((1, 4, 4, 4), np.nan, np.float32), {}, "blank image"),
        (np.arange(64, dtype=np.float32).reshape(1, 4, 4, 4) * 1000, {}, "values out of range"),
        (np.arange(64, dtype=np.float32).reshape(1, 4, 4, 4) * 2000, {"dtype": "float16"}, "values out of range"),
        (np.where(np.arange(64) == 3, np.inf, 1).astype(np.float32).reshape(1, 4, 4, 4), {}, "values out of range"),
        (np.zeros((2, 4, 4, 4), np.int16), {}, "bad shape"),
        (np.zeros((4, 4, 4), np.int16), {}, "bad shape"),
        (np.zeros((1, 400, 400, 400), np.int16), {"spacing_mm": (0.01, 0.01, 0.01)}, "volume too large"),
        (np.zeros((1, 4, 4, 4), np.int16), {"shape": (96, 96, 96), "chunk": (2, 2, 2)}, "volume too large"),
        (np.zeros((1, 4, 4, 4), np.int16), {"shape": (4096, 4096, 4096)}, "volume too large"),
        (np.zeros((1, 4, 4, 4), np.int16), {"chunk": (4096, 4096, 4096)}, "volume too large"),
        (np.zeros((1, 4, 4, 4), np.int16), {"shape": (4, 4, 4096), "chunk": (4, 4, 60)}, "volume too large"),
        (np.zeros((1, 4, 4, 5000), np.int16), {}, "volume too large"),
    ],
)
def test_a_volume_that_can_not_be_stored_is_told(voxels: np.ndarray, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(UnfitVolumeError) as error:
        fitted(RawVolume(voxels, (2, 1, 1)), spec(**changes))
    assert error.value.reason == reason
