"""The transforms of views on volumes: no folds, no shear, boxes and crops of three axes."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.augment import CuboidMask, Elastic, GaussianNoise, Intensity, RandomCrop, RotateScale, Transform, ViewsConfig
from draf_dist.augment.cuboid_mask import without_mask, without_slices
from draf_dist.augment.elastic import STEEPEST, spline
from draf_dist.augment.transform import centres
from draf_dist.augment.warp import Affine, warp
from draf_dist.errors import SpecError

SIZE = (11, 20, 27)
ALL = [RotateScale(), Elastic(), Intensity(), GaussianNoise(), CuboidMask(), RandomCrop()]


def keys_of(count: int) -> Tensor:
    return noise.sample_keys(5, "volumes", None, torch.arange(count), 1)[0]


def volumes(count: int = 4, channels: int = 1, size: tuple[int, ...] = SIZE) -> Tensor:
    return noise.normal(keys_of(count), (channels, *size))


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.kind)
def test_contract_of_a_transform_on_volumes(config: Transform) -> None:
    volume = volumes(5, channels=2)
    before = volume.clone()
    parameters = config.sample(keys_of(5), SIZE)
    result = config.apply(volume, parameters)
    assert torch.equal(volume, before)
    assert result.shape == volume.shape
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()
    assert not torch.equal(result, volume)
    assert {values.shape[0] for values in parameters.values()} == {5}
    assert torch.equal(config.apply(volume, parameters), result), "the record repeats it"
    for start, stop in ((3, 4), (0, 2), (1, 5)):
        part = config.sample(keys_of(5)[start:stop], SIZE)
        assert all(torch.equal(values, parameters[name][start:stop]) for name, values in part.items())
        assert torch.equal(config.apply(volume[start:stop], part), result[start:stop]), "no row depends on another"


def test_views_of_volumes_have_one_of_27_regions() -> None:
    uid = torch.arange(300)
    views = ViewsConfig(transforms=(RotateScale(), CuboidMask())).make(
        volumes(300, size=(4, 5, 6)), stream="ct", seed=0, epoch=torch.zeros_like(uid), uid=uid
    )
    assert views.first.image.shape == (300, 1, 4, 5, 6)
    assert RandomCrop().regions_of(3) == 27
    assert views.region.unique().numel() == 27


# Crop


def test_the_region_of_a_volume_is_the_cell_of_the_centre() -> None:
    crop = RandomCrop().sample(keys_of(27_000), SIZE)
    cell = (crop["centre"] * 3).long()
    assert torch.equal(crop["region"], (cell[:, 0] * 3 + cell[:, 1]) * 3 + cell[:, 2])
    assert (crop["region"].bincount(minlength=27) - 1000).abs().max() < 150
    assert ((crop["centre"] - crop["side"][:, None] / 2) >= -1e-6).all()


def test_a_window_of_a_volume_shows_the_part_around_its_centre() -> None:
    volume = volumes(1, size=(12, 16, 20))
    parameters = {"side": torch.tensor([0.5]), "centre": torch.tensor([[0.25, 0.75, 0.25]])}
    window = RandomCrop().apply(volume, parameters)
    octant = volume[..., :6, 8:, :10]
    expected = torch.nn.functional.interpolate(octant, size=(12, 16, 20), mode="trilinear", align_corners=False)
    torch.testing.assert_close(window[..., 1:-1, 1:-1, 1:-1], expected[..., 1:-1, 1:-1, 1:-1], rtol=0, atol=1e-4)


# Elastic


def smallest_determinant(field: Tensor) -> float:
    """Of the map p + u(p) between each voxel and its neighbours, one forward or one backward along every axis; u in fractions."""
    size = torch.tensor(field.shape[2:]).view(1, 3, 1, 1, 1)
    moved = field * size
    smallest = math.inf
    for sides in itertools.product((0, 1), repeat=3):
        columns = []
        for axis in range(3):
            step = moved.diff(dim=2 + axis)
            step[:, axis] += 1
            for other in range(3):
                if other != axis:
                    step = step.narrow(2 + other, sides[other], step.shape[2 + other] - 1)
            columns.append(step)
        # a . (b x c), the determinant of a matrix of three columns.
        smallest = min(smallest, float((columns[0] * torch.linalg.cross(columns[1], columns[2], dim=1)).sum(1).min()))
    return smallest


@pytest.mark.parametrize(
    "config",
    [Elastic(), Elastic(displacement=(0.03, 0.03)), Elastic(displacement=(0.3, 0.5), cells=6), Elastic(cells=1)],
    ids=["default", "three percent", "far too large", "one cell"],
)
@pytest.mark.parametrize("size", [(16, 18, 20), (5, 9, 48)])
def test_no_volume_is_folded(config: Elastic, size: tuple[int, int, int]) -> None:
    control = config.sample(keys_of(6), size)["control"]
    field = spline(control, size)
    assert smallest_determinant(field) > 0
    # Between voxels too: the field on a grid twice as fine.
    assert smallest_determinant(spline(control, tuple(2 * side for side in size))) > 0
    assert field.abs().max() <= config.displacement[1] * (1 + 1e-5)


def test_the_bound_of_slopes_adds_up_the_axes_and_of_a_linear_field_it_is_exact() -> None:
    cells, size = 4, (16, 20, 24)
    ramps = [torch.arange(7.0).view(*(-1 if other == axis else 1 for other in range(3))) for axis in range(3)]
    linear = 0.01 * ramps[0] - 0.02 * ramps[1] + 0.03 * ramps[2]
    control = torch.stack([linear, 0.5 * linear, torch.zeros_like(linear)])[None]
    field = spline(control, size)
    slopes = [(field.diff(dim=2 + axis) * size[axis]).abs().amax((2, 3, 4)) for axis in range(3)]
    bound = Elastic(cells=cells)._steepness(control)
    torch.testing.assert_close(bound, sum(slopes).amax(dim=1), rtol=1e-3, atol=0)
    torch.testing.assert_close(bound, torch.tensor([0.06 * cells]))


def test_the_determinant_sees_a_fold_of_a_volume() -> None:
    control = Elastic().sample(keys_of(4), (16, 18, 20))["control"]
    assert smallest_determinant(spline(control * 60, (16, 18, 20))) < 0


def test_the_limit_of_slopes_is_what_keeps_a_volume_from_folding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draf_dist.augment.elastic.STEEPEST", 1e6)
    field = spline(Elastic(displacement=(0.3, 0.5), cells=6).sample(keys_of(4), (16, 18, 20))["control"], (16, 18, 20))
    assert smallest_determinant(field) < 0


def test_of_one_to_three_percent_volumes_are_displaced_by_up_to_two_for_half_of_the_fields_are_made_smaller() -> None:
    config = Elastic(displacement=(0.01, 0.03))
    control = config.sample(keys_of(200), (16, 18, 20))["control"]
    peaks = spline(control, (16, 18, 20)).abs().flatten(1).amax(1)
    assert peaks.min() > 0.009
    assert 0.02 < peaks.max() < 0.023
    assert 0.4 < (config._steepness(control) > STEEPEST - 1e-4).float().mean() < 0.65


def test_displacement_moves_voxels_by_that_many_along_its_axis() -> None:
    volume = volumes(1)
    for axis, moved in enumerate((2, 3, 4)):
        control = torch.zeros(1, 3, 8, 8, 8)
        control[:, axis] = moved / SIZE[axis]
        kept = SIZE[axis] - moved
        result = Elastic().apply(volume, {"control": control}).narrow(2 + axis, 0, kept)
        torch.testing.assert_close(result, volume.narrow(2 + axis, moved, kept), rtol=0, atol=1e-4)


# Boxes


def test_a_cuboid_is_the_training_mean_and_the_rest_is_untouched() -> None:
    volume = volumes(1, channels=2, size=(8, 12, 16)) + 10
    corners = {"low": torch.tensor([[[0.25, 0.5, 0.0]]]), "high": torch.tensor([[[0.5, 0.75, 0.125]]])}
    expected = volume.clone()
    expected[..., 2:4, 6:9, 0:2] = 0
    assert torch.equal(CuboidMask().apply(volume, corners), expected)


@pytest.mark.parametrize("size", [(24, 31), SIZE])
def test_boxes_taken_out_one_by_one_or_by_a_mask_are_the_same(size: tuple[int, ...]) -> None:
    image = volumes(60, channels=2, size=size)
    corners = CuboidMask(side=(0.01, 0.5)).sample(keys_of(60), size)
    assert torch.equal(without_slices(image, **corners), without_mask(image, **corners))


def test_one_to_three_cuboids_of_a_tenth_to_a_fifth() -> None:
    parameters = CuboidMask().sample(keys_of(2000), SIZE)
    assert parameters["low"].shape == (2000, 3, 3)
    sides = parameters["high"] - parameters["low"]
    used = (sides > 0).all(dim=2)
    assert set(used.sum(dim=1).tolist()) == {1, 2, 3}
    assert sides[used].min() >= 0.1 - 1e-6
    assert sides[used].max() <= 0.2 + 1e-6
    assert parameters["high"].max() <= 1


# Rotation and scale


def about(axis: tuple[float, float, float], degrees: float, scale: float = 1.0) -> dict[str, Tensor]:
    return {"degrees": torch.tensor([degrees]), "scale": torch.tensor([scale]), "axis": torch.tensor([axis])}


def test_a_volume_that_turns_about_the_body_axis_turns_slice_by_slice() -> None:
    volume = volumes(2)
    turned = RotateScale().apply(volume, about((1.0, 0.0, 0.0), 25.0))
    flat = {"degrees": torch.tensor([25.0]), "scale": torch.tensor([1.0])}
    for depth in range(SIZE[0]):
        torch.testing.assert_close(turned[:, :, depth], RotateScale().apply(volume[:, :, depth], flat), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("axis", "plane"), [((1.0, 0, 0), (3, 4)), ((0, 1.0, 0), (4, 2)), ((0, 0, 1.0), (2, 3))])
def test_a_quarter_turn_about_each_axis(axis: tuple[float, float, float], plane: tuple[int, int]) -> None:
    volume = volumes(1, size=(9, 9, 9))
    result = RotateScale().apply(volume, about(axis, 90.0))
    torch.testing.assert_close(result, torch.rot90(volume, 1, plane), rtol=0, atol=1e-4)


def test_axes_point_everywhere_alike_and_angles_stay_within_ten_degrees() -> None:
    parameters = RotateScale(max_degrees=10).sample(keys_of(6000), SIZE)
    axis = parameters["axis"]
    torch.testing.assert_close(axis.norm(dim=1), torch.ones(6000))
    assert axis.mean(dim=0).abs().max() < 0.03
    torch.testing.assert_close(axis.T @ axis / 6000, torch.eye(3) / 3, rtol=0, atol=0.02)
    assert 9.8 < parameters["degrees"].abs().max() <= 10


def ball(size: tuple[int, ...], spacing: tuple[float, ...], radius: float, offset: tuple[float, ...]) -> Tensor:
    """A soft ball in units of length, about the centre moved by offset."""
    squared = torch.zeros(size)
    for axis, (length, voxel) in enumerate(zip(size, spacing, strict=True)):
        place = (torch.arange(length) + 0.5 - length / 2) * voxel - offset[axis]
        squared = squared + place.view(*(-1 if other == axis else 1 for other in range(len(size)))) ** 2
    return torch.exp(-squared / (2 * radius**2))[None, None]


def moments(volume: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the place, in units of length."""
    mass = volume[0, 0] / volume.sum()
    place = [(torch.arange(n) + 0.5 - n / 2) * voxel for n, voxel in zip(mass.shape, spacing, strict=True)]
    grid = torch.stack(torch.meshgrid(*place, indexing="ij"))
    mean = (grid * mass).flatten(1).sum(1)
    centred = (grid - mean.view(-1, 1, 1, 1)).flatten(1)
    return mean, (centred * mass.flatten()) @ centred.T


def test_with_its_spacing_a_ball_stays_a_ball_and_goes_where_the_rotation_takes_it() -> None:
    size, spacing = (24, 48, 40), (4.0, 2.0, 2.5)
    volume = ball(size, spacing, 9.0, (0.0, 12.0, 0.0))
    # About (0, 0, 1) by 40 degrees: the plane of D and H.
    mean, covariance = moments(RotateScale(spacing=spacing, max_degrees=45).apply(volume, about((0.0, 0.0, 1.0), 40.0)), spacing)
    angle = math.radians(40)
    assert mean.norm().item() == pytest.approx(12.0, rel=0.02)
    assert mean[0].abs().item() == pytest.approx(12 * math.sin(angle), rel=0.02)
    assert mean[1].item() == pytest.approx(12 * math.cos(angle), rel=0.02)
    assert (covariance - covariance.diagonal().mean() * torch.eye(3)).abs().max() < 0.05 * covariance[0, 0]
    sheared, _ = moments(RotateScale(max_degrees=45).apply(volume, about((0.0, 0.0, 1.0), 40.0)), spacing)
    assert abs(sheared.norm() - 12.0) > 1, "in voxels it would not"


def test_a_ball_grows_by_the_cube_of_the_scale() -> None:
    volume = ball((20, 40, 40), (4.0, 2.0, 2.0), 8.0, (0.0, 0.0, 0.0))
    config = RotateScale(spacing=(4, 2, 2))
    grown = config.apply(volume, about((0.6, 0.8, 0.0), 8.0, scale=1.1))
    assert (grown.sum() / volume.sum()).item() == pytest.approx(1.331, rel=0.01)


def test_a_spacing_of_another_number_of_axes_is_refused() -> None:
    with pytest.raises(SpecError, match=r"expected 2 numbers, found 3"):
        RotateScale(spacing=(1, 1, 1)).sample(keys_of(2), (8, 8))


def test_a_spacing_that_is_not_given_is_not_written() -> None:
    assert "spacing" not in RotateScale().model_dump()
    assert RotateScale.model_validate(RotateScale(spacing=(1, 2)).model_dump()).spacing == (1, 2)


# All in one interpolation


@pytest.mark.parametrize("size", [(48, 56), (20, 24, 28)])
def test_one_warp_is_crop_then_rotation_then_deformation(size: tuple[int, ...]) -> None:
    spacing = (1.0, 1.5) if len(size) == 2 else (2.0, 1.0, 1.5)
    steps = RandomCrop(), RotateScale(max_degrees=10, spacing=spacing), Elastic(displacement=(0.03, 0.03))
    crop, turn, deform = (step.sample(keys_of(4), size) for step in steps)
    # One ramp along every axis: linear interpolation of it is exact, however often.
    ramps = torch.meshgrid(*(centres(length, torch.device("cpu")) for length in size), indexing="ij")
    image = torch.stack(ramps).expand(4, *(-1 for _ in range(len(size) + 1)))
    one_by_one = image
    for step, parameters in zip(steps, (crop, turn, deform), strict=True):
        one_by_one = step.apply(one_by_one, parameters)
    at_once = warp(image, steps[0].affine(crop).of(steps[1].affine(turn, size)), deform["control"])
    # Away from the edges, which each step continues by itself.
    inner = (..., *(slice(length // 4, -(length // 4)) for length in size))
    torch.testing.assert_close(at_once[inner], one_by_one[inner], rtol=0, atol=1e-5)


def test_a_warp_that_does_nothing_is_the_image() -> None:
    volume = volumes(2)
    identity = Affine(torch.eye(3).expand(2, 3, 3), torch.zeros(2, 3))
    torch.testing.assert_close(warp(volume, identity, torch.zeros(2, 3, 8, 8, 8)), volume, rtol=0, atol=1e-4)


def test_affine_maps_are_composed_from_the_inside_out() -> None:
    outer, inner = (Affine(noise.normal(keys_of(3) + k, (2, 2)), noise.normal(keys_of(3) - k, (2,))) for k in (1, 2))
    point = centres(2, torch.device("cpu"))
    both = outer.of(inner)
    expected = (outer.matrix @ (inner.matrix @ point + inner.offset)[..., None])[..., 0] + outer.offset
    torch.testing.assert_close(both.matrix @ point + both.offset, expected)
