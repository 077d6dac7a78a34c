"""The presets of CT, MRI and radiographs: keyed by sample, recorded, and each with the physics of its own modality alone."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from draf_dist import noise
from draf_dist.augment import (
    AnyViews,
    BeamHardening,
    CtPreset,
    CuboidMask,
    Cupping,
    CxrPreset,
    Elastic,
    GaussianNoise,
    Intensity,
    KSpaceUndersampling,
    MriPreset,
    PoissonNoise,
    Preset,
    RotateScale,
    Views,
    ViewsConfig,
    Window,
)
from draf_dist.errors import SpecError

PRESETS = [CtPreset(), MriPreset(), CxrPreset()]
SCALES = {"ct": (-300.0, 450.0), "mri": (80.0, 60.0), "cxr": (120.0, 55.0)}
SIZES = [(24, 31), (6, 17, 20)]


def scale_of(preset: Preset) -> tuple[Tensor, Tensor]:
    mean, deviation = SCALES[preset.kind]
    return torch.tensor(mean), torch.tensor(deviation)


def standardised(preset: Preset, size: tuple[int, ...], count: int = 5) -> Tensor:
    keys = noise.sample_keys(1, "presets", None, torch.arange(count), 1)[0]
    uniform = noise.uniform(keys, (1, *size))
    stored = uniform * 1500 - 1000 if preset.kind == "ct" else uniform * 255
    mean, deviation = scale_of(preset)
    return (stored - mean) / deviation


def views_of(preset: Preset, image: Tensor, uid: Tensor, *, seed: int = 0, epoch: int = 1, stream: str = "scan") -> Views:
    return preset.make(image, scale=scale_of(preset), stream=stream, seed=seed, epoch=torch.full_like(uid, epoch), uid=uid)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.kind)
@pytest.mark.parametrize("size", SIZES, ids=["image", "volume"])
def test_a_sample_meets_the_same_views_in_any_batch(preset: Preset, size: tuple[int, ...]) -> None:
    image, uid = standardised(preset, size), torch.tensor([7, 300, 2, 41, 8])
    before = image.clone()
    whole = views_of(preset, image, uid)
    assert torch.equal(image, before)
    assert whole.first.image.shape == image.shape
    for rows in (torch.tensor([4]), torch.tensor([3, 0]), torch.tensor([1, 4, 2])):
        part = views_of(preset, image[rows], uid[rows])
        assert torch.equal(part.region, whole.region[rows])
        for mine, all_of_them in ((part.first, whole.first), (part.second, whole.second)):
            assert torch.isfinite(mine.image).all()
            assert torch.equal(mine.image, all_of_them.image[rows])
            for kind, parameters in mine.applied.items():
                for name, values in parameters.items():
                    assert torch.equal(values, all_of_them.applied[kind][name][rows])


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.kind)
def test_views_depend_on_seed_view_epoch_sample_and_modality(preset: Preset) -> None:
    image = standardised(preset, (24, 31), 1).expand(2, -1, -1, -1)
    uid = torch.tensor([3, 4])
    here = views_of(preset, image, uid)
    assert not torch.equal(here.first.image, here.second.image)
    assert not torch.equal(here.first.image[0], here.first.image[1])
    for other in ({"seed": 1}, {"epoch": 2}, {"stream": "other"}):
        assert not torch.equal(views_of(preset, image, uid, **other).first.image, here.first.image)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.kind)
@pytest.mark.parametrize("size", SIZES, ids=["image", "volume"])
def test_every_step_logs_its_parameters_and_they_alone_repeat_the_view(preset: Preset, size: tuple[int, ...]) -> None:
    image = standardised(preset, size)
    views = views_of(preset, image, torch.arange(5))
    steps = [*preset.acquisition, preset.rotate_scale, preset.elastic, *preset.transforms]
    assert list(views.second.applied) == [step.kind for step in steps]
    assert all(len(parameters) > 0 for parameters in views.second.applied.values())
    again = preset.view(image, scale_of(preset), views.crop, views.second.applied)
    assert torch.equal(again.image, views.second.image)


def test_acquisition_happens_to_stored_values() -> None:
    """A window clips HU: with nothing else, no standardised value is beyond its ends."""
    preset = CtPreset(acquisition=(Window(centre_change=0, width_change=0),), transforms=())
    views = views_of(preset, 50 * standardised(preset, (24, 31)), torch.arange(5))
    mean, deviation = SCALES["ct"]
    assert views.first.image.min().item() == pytest.approx((-160 - mean) / deviation, abs=1e-4)
    assert views.first.image.max().item() == pytest.approx((240 - mean) / deviation, abs=1e-4)


def test_acquisition_happens_to_the_whole_image_before_the_crop() -> None:
    """Rays through the body outside of the crop harden what lies within it."""
    preset = CtPreset(acquisition=(BeamHardening(strength=(0.5, 0.5), pixel_mm=4),), transforms=())
    mean, deviation = scale_of(preset)
    place = torch.arange(64) + 0.5 - 32
    body = torch.where((place[:, None] / 18) ** 2 + (place / 28) ** 2 < 1, 0.0, -1000.0).expand(3, 1, 64, 64)
    image = (body - mean) / deviation
    views = views_of(preset, image, torch.arange(3))
    hardened = BeamHardening(pixel_mm=4).apply(body, views.first.applied["beam_hardening"])
    plain = CtPreset(acquisition=(), transforms=())
    expected = plain.view((hardened - mean) / deviation, scale_of(plain), views.crop, views.first.applied)
    torch.testing.assert_close(views.first.image, expected.image, rtol=0, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.kind)
def test_views_do_not_move_the_region(preset: Preset) -> None:
    """A mark in the middle of the crop stays within half a cell, a sixth of the image or a third of the window, of it."""
    size = (48, 48)
    plain = type(preset)(acquisition=(), transforms=(), crop=preset.crop)
    views = views_of(plain, standardised(preset, size, 12), torch.arange(12))
    place = (torch.arange(48) + 0.5) / 48
    for view in (views.first, views.second):
        centre, width = views.crop["centre"], views.crop["side"] / 12
        near = [torch.exp(-(((place - centre[:, axis, None]) / width[:, None]) ** 2)) for axis in range(2)]
        mark = (near[0][:, :, None] * near[1][:, None])[:, None]
        moved = plain.view(mark, scale_of(plain), views.crop, view.applied).image
        mass = moved.sum((1, 2, 3))
        for line in (moved.sum((1, 2)) @ place, moved.sum((1, 3)) @ place):
            assert (line / mass - 0.5).abs().max() < 0.06


def test_presets_have_the_steps_and_ranges_of_the_specification() -> None:
    ct, mri, cxr = PRESETS
    assert [step.kind for step in ct.acquisition] == ["beam_hardening", "window"]
    assert [step.kind for step in mri.acquisition] == ["bias_field", "k_space", "gibbs_ringing", "rician_noise"]
    assert [step.kind for step in cxr.acquisition] == ["poisson_noise"]
    assert ct.rotate_scale.max_degrees == mri.rotate_scale.max_degrees == 10
    assert cxr.rotate_scale.max_degrees == 7
    assert ct.elastic.displacement[1] == mri.elastic.displacement[1] == 0.03
    assert cxr.elastic.displacement[1] == 0.015
    assert Intensity(gamma=(0.7, 1.4)) in mri.transforms
    assert Intensity() in cxr.transforms
    for preset in PRESETS:
        assert CuboidMask() in preset.transforms
    assert GaussianNoise() in ct.transforms
    assert GaussianNoise() in cxr.transforms


def test_a_preset_is_chosen_by_its_kind_and_survives_a_file() -> None:
    chosen: TypeAdapter[Preset | ViewsConfig] = TypeAdapter(AnyViews)
    for preset in PRESETS:
        assert chosen.validate_python(preset.model_dump()) == preset
    assert chosen.validate_python({}) == chosen.validate_python(ViewsConfig().model_dump()) == ViewsConfig()
    cheap = chosen.validate_python({"kind": "ct", "acquisition": [{"kind": "cupping"}]})
    assert isinstance(cheap, CtPreset)
    assert cheap.acquisition == (Cupping(),)


@pytest.mark.parametrize(
    "tree",
    [
        {"kind": "ct", "acquisition": [{"kind": "k_space"}]},
        {"kind": "mri", "acquisition": [{"kind": "window"}]},
        {"kind": "cxr", "acquisition": [{"kind": "beam_hardening"}]},
    ],
    ids=lambda tree: tree["kind"],
)
def test_physics_of_another_modality_is_refused(tree: dict) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(AnyViews).validate_python(tree)


def test_a_step_listed_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="listed twice"):
        CxrPreset(acquisition=(PoissonNoise(), PoissonNoise(contrast=10)))
    with pytest.raises(ValidationError, match="listed twice"):
        MriPreset(acquisition=(KSpaceUndersampling(), KSpaceUndersampling()))


def test_a_spacing_for_other_images_is_named() -> None:
    preset = MriPreset(rotate_scale=RotateScale(spacing=(3, 1, 1)), elastic=Elastic())
    with pytest.raises(SpecError, match="rotate_scale: spacing"):
        views_of(preset, standardised(preset, (24, 31)), torch.arange(5))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.kind)
def test_how_many_rows_are_worked_on_at_once_changes_nothing(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    image, uid = standardised(preset, (24, 31)), torch.arange(5)
    whole = views_of(preset, image, uid)
    for block in (1, 2 * 24 * 31):
        monkeypatch.setattr("draf_dist.augment.transform.BLOCK_CPU", block)
        again = views_of(preset, image, uid)
        assert torch.equal(again.first.image, whole.first.image)
        assert torch.equal(again.second.image, whole.second.image)
