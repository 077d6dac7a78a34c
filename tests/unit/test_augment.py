"""Transforms for views: keyed by sample, within their ranges, without folds, flips or moved labels."""

from itertools import product
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from draf_dist import noise
from draf_dist.augment import (
    CuboidMask,
    Elastic,
    GaussianNoise,
    Intensity,
    RandomCrop,
    RotateScale,
    Transform,
    Views,
    ViewsConfig,
    ViewTransform,
)
from draf_dist.augment.elastic import spline
from draf_dist.augment.transform import centres

HEIGHT, WIDTH = 40, 48
SIZE = (HEIGHT, WIDTH)
UNION = get_args(get_args(ViewTransform)[0])


def images(count: int = 6, channels: int = 1) -> Tensor:
    keys = noise.sample_keys(7, "test images", None, torch.arange(count), 1)[0]
    return noise.normal(keys, (channels, *SIZE))


def keys_of(count: int) -> Tensor:
    return noise.sample_keys(3, "test keys", None, torch.arange(count), 1)[0]


def views_of(config: ViewsConfig, image: Tensor, uid: Tensor, *, seed: int = 0, epoch: int = 2, stream: str = "cxr") -> Views:
    return config.make(image, stream=stream, seed=seed, epoch=torch.full_like(uid, epoch), uid=uid)


# Every member of the union


@pytest.mark.parametrize("config", [kind() for kind in UNION] + [RandomCrop()], ids=lambda c: c.kind)
def test_contract_of_a_transform(config: Transform) -> None:
    image = images(5, channels=2)
    before = image.clone()
    parameters = config.sample(keys_of(5), SIZE)
    result = config.apply(image, parameters)
    assert torch.equal(image, before)
    assert result.shape == image.shape
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()
    assert not torch.equal(result, image)
    assert {values.shape[0] for values in parameters.values()} == {5}
    assert torch.equal(config.apply(image, parameters), result), "the record repeats it"
    row = {name: values[3:4] for name, values in parameters.items()}
    assert torch.equal(config.apply(image[3:4], row), result[3:4]), "no row depends on another"
    flat = config.apply(torch.full_like(image, 0.25), parameters)
    assert torch.isfinite(flat).all()


# Views


def test_a_sample_meets_the_same_views_in_any_batch() -> None:
    config, image, uid = ViewsConfig(), images(7), torch.tensor([5, 900, 17, 3, 44, 2, 81])
    whole = views_of(config, image, uid)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    for rows in (*order.split(1), *order.split(2), *order.split(3)):
        part = views_of(config, image[rows], uid[rows])
        assert torch.equal(part.region, whole.region[rows])
        for mine, all_of_them in ((part.first, whole.first), (part.second, whole.second)):
            assert torch.equal(mine.image, all_of_them.image[rows])
            for kind, parameters in mine.applied.items():
                for name, values in parameters.items():
                    assert torch.equal(values, all_of_them.applied[kind][name][rows])


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 3}, {"stream": "ct"}])
def test_another_seed_epoch_or_modality_gives_other_views(other: dict) -> None:
    uid = torch.arange(4)
    here, there = views_of(ViewsConfig(), images(4), uid), views_of(ViewsConfig(), images(4), uid, **other)
    assert not torch.equal(here.first.image, there.first.image)
    assert not torch.equal(here.crop["centre"], there.crop["centre"])


def test_two_views_of_a_sample_and_one_view_of_two_samples_differ() -> None:
    image = images(1).expand(2, -1, -1, -1)
    views = views_of(ViewsConfig(), image, torch.tensor([1, 2]))
    assert not torch.equal(views.first.image, views.second.image)
    for kind, parameters in views.first.applied.items():
        for name, values in parameters.items():
            assert not torch.equal(values, views.second.applied[kind][name]), (kind, name)
            assert not torch.equal(values[0], values[1]), (kind, name)


def test_the_record_alone_repeats_a_view() -> None:
    config, image = ViewsConfig(), images(3)
    views = views_of(config, image, torch.arange(3))
    again = config.crop.apply(image, views.crop)
    for transform in config.transforms:
        again = transform.apply(again, views.second.applied[transform.kind])
    assert list(views.second.applied) == [transform.kind for transform in config.transforms]
    assert torch.equal(again, views.second.image)


def test_a_transform_listed_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="listed twice"):
        ViewsConfig(transforms=(Elastic(), Elastic()))


# Intensity


def test_gamma_keeps_the_range_and_the_order_of_values() -> None:
    image = images(5)
    parameters = Intensity().sample(keys_of(5), SIZE)
    result = Intensity().apply(image, parameters)
    for side in ("amin", "amax"):
        torch.testing.assert_close(getattr(result, side)((-2, -1)), getattr(image, side)((-2, -1)))
    ranks = image.flatten(1).argsort(dim=1)
    assert (result.flatten(1).gather(1, ranks).diff(dim=1) >= -1e-6).all()


def test_gamma_after_standardisation_is_gamma_before_it() -> None:
    image = images(5)
    parameters = Intensity().sample(keys_of(5), SIZE)
    stored = image * 50 + 100
    after = Intensity().apply(image, parameters) * 50 + 100
    torch.testing.assert_close(Intensity().apply(stored, parameters), after, rtol=0, atol=1e-3)


def test_gamma_of_a_ramp() -> None:
    ramp = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 4)
    result = Intensity().apply(ramp, {"gamma": torch.tensor([2.0])})
    torch.testing.assert_close(result.flatten(), torch.tensor([-1.0, -0.75, 0.0, 3.0]))


def test_gamma_is_as_often_above_one_as_below() -> None:
    gamma = Intensity().sample(keys_of(4000), SIZE)["gamma"]
    assert 0.8 <= gamma.min() < 0.805
    assert 1.245 < gamma.max() <= 1.25
    assert abs((gamma > 1).float().mean() - 0.5) < 0.03


# Elastic


def smallest_determinant(displacement: Tensor) -> float:
    """Of the map p + u(p) on every triangle of neighbouring pixels; u (B, 2, H, W) in fractions of the extent."""
    height, width = displacement.shape[-2:]
    y, x = displacement[:, 0] * height, displacement[:, 1] * width
    down = [torch.stack([y.diff(dim=1) + 1, x.diff(dim=1)])[..., start : start + width - 1] for start in (0, 1)]
    right = [torch.stack([y.diff(dim=2), x.diff(dim=2) + 1])[..., start : start + height - 1, :] for start in (0, 1)]
    return min(float((d[0] * r[1] - d[1] * r[0]).min()) for d, r in product(down, right))


@pytest.mark.parametrize(
    "config",
    [Elastic(), Elastic(displacement=(0.03, 0.03), cells=8), Elastic(displacement=(0.3, 0.5), cells=7), Elastic(cells=1)],
    ids=["default", "three percent", "far too large", "one cell"],
)
@pytest.mark.parametrize("size", [SIZE, (9, 160)])
def test_no_fold_anywhere(config: Elastic, size: tuple[int, int]) -> None:
    control = config.sample(keys_of(64), size)["control"]
    field = spline(control, size)
    assert smallest_determinant(field) > 0
    # Between pixels too: the field on a grid four times as fine.
    assert smallest_determinant(spline(control, (4 * size[0], 4 * size[1]))) > 0
    assert field.abs().max() <= config.displacement[1] * (1 + 1e-5)


def test_the_determinant_sees_a_fold() -> None:
    control = Elastic().sample(keys_of(8), SIZE)["control"]
    assert smallest_determinant(spline(control * 40, SIZE)) < 0


def test_the_limit_of_slopes_is_what_keeps_a_large_field_from_folding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draf_dist.augment.elastic.STEEPEST", 1e6)
    field = spline(Elastic(displacement=(0.3, 0.5), cells=7).sample(keys_of(8), SIZE)["control"], SIZE)
    assert smallest_determinant(field) < 0


def test_radiographs_are_displaced_by_up_to_one_and_a_half_percent() -> None:
    peaks = spline(Elastic().sample(keys_of(300), SIZE)["control"], SIZE).abs().amax((1, 2, 3))
    assert peaks.min() > 0.004
    assert 0.0145 < peaks.max() <= 0.015 * (1 + 1e-5)


def test_a_constant_control_grid_moves_everything_alike() -> None:
    torch.testing.assert_close(spline(torch.full((1, 2, 8, 8), 0.01), SIZE), torch.full((1, 2, *SIZE), 0.01))


def test_displacement_moves_pixels_by_that_many() -> None:
    image = images(1)
    control = torch.zeros(1, 2, 8, 8)
    control[:, 1] = 3 / WIDTH
    torch.testing.assert_close(Elastic().apply(image, {"control": control})[..., :-3], image[..., 3:], rtol=0, atol=1e-4)


# Boxes


def test_one_to_three_boxes_of_a_tenth_to_a_fifth_within_the_image() -> None:
    parameters = CuboidMask().sample(keys_of(3000), SIZE)
    low, high = parameters["low"], parameters["high"]
    used = (high > low).all(dim=2)
    counts = used.sum(dim=1)
    assert counts.bincount(minlength=4)[0] == 0
    assert (counts.bincount()[1:] > 900).all()
    sides = (high - low)[used]
    assert sides.min() >= 0.1 - 1e-6
    assert sides.max() <= 0.2 + 1e-6
    assert low.min() >= 0
    assert high.max() <= 1


def test_a_box_is_the_training_mean_and_the_rest_is_untouched() -> None:
    image = images(1) + 10
    corners = {"low": torch.tensor([[[0.25, 0.5]]]), "high": torch.tensor([[[0.5, 0.75]]])}
    result = CuboidMask().apply(image, corners)
    expected = image.clone()
    expected[..., 10:20, 24:36] = 0
    assert torch.equal(result, expected)


# Noise


def test_noise_has_its_sigma_and_is_drawn_anew_for_every_sample() -> None:
    config = GaussianNoise(sigma=(0.1, 0.1))
    added = config.apply(torch.zeros(40, 1, *SIZE), config.sample(keys_of(40), SIZE))
    assert added.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs(torch.corrcoef(added.flatten(1)[:2])[0, 1]) < 0.1


# Rotation and scale


def test_no_turn_and_no_scale_is_identity() -> None:
    image = images(2)
    result = RotateScale().apply(image, {"degrees": torch.zeros(2), "scale": torch.ones(2)})
    torch.testing.assert_close(result, image, rtol=0, atol=1e-4)


def test_a_quarter_turn_is_counter_clockwise() -> None:
    image = images(1)[..., :40]
    result = RotateScale().apply(image, {"degrees": torch.tensor([90.0]), "scale": torch.ones(1)})
    torch.testing.assert_close(result, torch.rot90(image, 1, (-2, -1)), rtol=0, atol=1e-4)


def test_a_disc_grows_by_the_square_of_the_scale_whatever_the_shape_of_the_image() -> None:
    y, x = (centres(HEIGHT, torch.device("cpu")) - 0.5) * HEIGHT, (centres(WIDTH, torch.device("cpu")) - 0.5) * WIDTH
    disc = (y[:, None] ** 2 + x**2 < 12**2).float()[None, None]
    result = RotateScale().apply(disc, {"degrees": torch.tensor([5.0]), "scale": torch.tensor([1.1])})
    assert (result.sum() / disc.sum()).item() == pytest.approx(1.21, rel=0.01)


def test_angles_stay_within_seven_degrees_and_left_stays_left() -> None:
    parameters = RotateScale().sample(keys_of(500), SIZE)
    assert 6.8 < parameters["degrees"].abs().max() <= 7
    assert parameters["scale"].min() >= 0.9
    assert parameters["scale"].max() <= 1.1
    left = torch.zeros(500, 1, *SIZE)
    left[..., 16:24, 4:12] = 1
    columns = RotateScale().apply(left, parameters).sum((1, 2)) @ torch.arange(WIDTH).float()
    mass = RotateScale().apply(left, parameters).sum((1, 2, 3))
    assert (columns / mass < WIDTH / 2 - 4).all()


# Crop


def test_the_region_is_the_cell_of_the_centre_and_all_are_equally_frequent() -> None:
    crop = RandomCrop().sample(keys_of(9000), SIZE)
    cell = (crop["centre"] * 3).long()
    assert torch.equal(crop["region"], cell[:, 0] * 3 + cell[:, 1])
    assert (crop["region"].bincount(minlength=9) - 1000).abs().max() < 120
    half = crop["side"][:, None] / 2
    assert (crop["centre"] - half).min() >= -1e-6
    assert (crop["centre"] + half).max() <= 1 + 1e-6


def test_the_window_shows_the_part_around_its_centre() -> None:
    image = images(1)
    parameters = {"side": torch.tensor([0.5]), "centre": torch.tensor([[0.25, 0.75]])}
    window = RandomCrop().apply(image, parameters)
    quarter = image[..., : HEIGHT // 2, WIDTH // 2 :]
    inner = torch.nn.functional.interpolate(quarter, size=SIZE, mode="bilinear", align_corners=False)
    torch.testing.assert_close(window[..., 1:-1, 1:-1], inner[..., 1:-1, 1:-1], rtol=0, atol=1e-4)


def test_a_window_too_large_to_have_its_centre_in_an_outer_cell_is_refused() -> None:
    with pytest.raises(ValidationError, match="outer cell"):
        RandomCrop(side=(0.4, 0.7))


def test_views_do_not_move_the_region() -> None:
    uid = torch.arange(20)
    plain = views_of(ViewsConfig(transforms=()), images(20), uid)
    full = views_of(ViewsConfig(), images(20), uid)
    assert torch.equal(plain.region, full.region)
    # A mark at the centre of the crop stays within half a cell (a sixth of the extent) of it in either view.
    mark = torch.zeros(20, 1, *SIZE)
    mark[..., 18:22, 22:26] = 1
    for kinds in ((RotateScale(),), (Elastic(),), (RotateScale(), Elastic())):
        for view in ("first", "second"):
            moved = mark
            for transform in kinds:
                moved = transform.apply(moved, getattr(full, view).applied[transform.kind])
            mass = moved.sum((1, 2, 3))
            assert ((moved.sum((1, 2)) @ centres(WIDTH, mark.device)) / mass - 0.5).abs().max() < 0.03
            assert ((moved.sum((1, 3)) @ centres(HEIGHT, mark.device)) / mass - 0.5).abs().max() < 0.03
