"""Closed forms of what X-rays do to images: hardening of beams, cups, windows, counts of quanta."""

import math

import numpy as np
import pytest
import torch
from physics_inputs import keys_of, magnitudes
from scipy.stats import norm, poisson
from torch import Tensor

from draf_dist import noise
from draf_dist.augment import BeamHardening, Cupping, PoissonNoise, Window
from draf_dist.augment.poisson_noise import poisson_counts
from draf_dist.augment.radon import detectors, filtered_back_projection, project

# Beam hardening


def test_oracle_of_a_ray_of_two_energies() -> None:
    """w = (.5, .5), mu = (.2, .4) per cm, 10 cm: 2.5662192 and not 3; kappa = mu / .3."""
    config = BeamHardening(kappas=(2 / 3, 4 / 3), strength=(1, 1))
    p = torch.tensor([[3.0]], dtype=torch.float64)
    taken = config.hardening(p, torch.ones(1, dtype=torch.float64))
    assert (p + taken).item() == pytest.approx(2.5662192, abs=1e-7)
    assert (p + taken).item() == pytest.approx(-math.log(0.5 * math.exp(-2) + 0.5 * math.exp(-4)), abs=1e-12)


def test_rays_of_an_uneven_spectrum_follow_its_sum() -> None:
    """p' = -ln sum w exp(-kappa p), with kappas that are not symmetric about 1, pulled towards 1 by the strength."""
    config = BeamHardening(weights=(0.25, 0.75), kappas=(1.6, 0.8))
    p, strength = torch.linspace(0, 12, 25, dtype=torch.float64).expand(3, -1), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    kappas = 1 + strength[:, None] * (torch.tensor([1.6, 0.8], dtype=torch.float64) - 1)
    expected = -sum(w * torch.exp(-k[:, None] * p) for w, k in zip((0.25, 0.75), kappas.T, strict=True)).log()
    torch.testing.assert_close(p + config.hardening(p, strength), expected, rtol=0, atol=1e-9)


def test_one_energy_makes_no_artefact() -> None:
    ct = 1000 * magnitudes(2, 1, 24, 24)
    same = BeamHardening(kappas=(1.0, 1.0))
    assert torch.equal(same.apply(ct, {"strength": torch.ones(2)}), ct)
    assert torch.equal(BeamHardening().apply(ct, {"strength": torch.zeros(2)}), ct)


def test_a_beam_of_many_energies_is_never_weakened_more() -> None:
    p = torch.linspace(0, 30, 3001).expand(5, -1)
    taken = BeamHardening().hardening(p, torch.linspace(0, 1, 5))
    assert (taken <= 0).all()
    assert (taken[1:, 1:] < 0).all()
    assert (taken[:, 0] == 0).all()
    assert (taken.diff(dim=0) <= 1e-6).all(), "the farther apart the energies, the more"
    # Unit slope at 0: thin rays are as before.
    assert taken[-1, 1].abs() < 1e-5


def disc(side: int, radius: float, inside: float, outside: float) -> Tensor:
    place = torch.arange(side) + 0.5 - side / 2
    return torch.where(place[:, None] ** 2 + place**2 <= radius**2, inside, outside)[None]


def test_rays_through_a_disc_are_its_chords() -> None:
    sinogram = project(disc(128, 40, 1.0, 0.0), angles=30, pixel=0.5)
    num = detectors(128, 128)
    place = torch.arange(num) - (num - 1) / 2
    chords = (40**2 - place**2).clamp_min(0).sqrt()
    assert sinogram.shape == (1, 30, num)
    assert (sinogram - chords).abs().max() < 1.5
    assert (sinogram - chords).abs()[..., place.abs() < 36].max() < 0.6


def test_every_direction_sees_the_same_mass() -> None:
    slices = noise.uniform(keys_of(3), (30, 41))
    mass = project(slices, angles=24, pixel=1.0).sum(-1)
    torch.testing.assert_close(mass, slices.sum((1, 2))[:, None].expand_as(mass), rtol=0.01, atol=0)


def test_back_projection_brings_the_slice_back() -> None:
    slices = torch.cat([disc(96, 34, 0.2, 0.0), disc(96, 20, 0.5, 0.0)])
    found = filtered_back_projection(project(slices, angles=180, pixel=0.3), 96, 96, pixel=0.3)
    for image, again, radius, level in zip(slices, found, (34, 20), (0.2, 0.5), strict=True):
        inner = disc(96, radius - 3, 1.0, 0.0)[0] > 0
        assert again[inner].mean().item() == pytest.approx(level, rel=0.01)
        outer = disc(96, radius + 3, 0.0, 1.0)[0] > 0
        assert (again[outer] - image[outer]).abs().max() < 0.1 * level


def test_what_lies_beside_the_centre_comes_back_to_its_place() -> None:
    place = torch.arange(64) + 0.5 - 32
    slices = (((place[:, None] - 14) ** 2 + (place + 9) ** 2) < 36).float()[None]
    found = filtered_back_projection(project(slices, angles=90, pixel=1.0), 64, 64, pixel=1.0)[0]
    mass = found.clamp_min(0.3) - 0.3
    assert ((mass.sum(1) @ place) / mass.sum()).item() == pytest.approx(14, abs=0.3)
    assert ((mass.sum(0) @ place) / mass.sum()).item() == pytest.approx(-9, abs=0.3)


def water(side: int = 96, radius_cm: float = 15.0, pixel_mm: float = 4.0) -> Tensor:
    return disc(side, radius_cm * 10 / pixel_mm, 0.0, -1000.0)[None]


@pytest.mark.parametrize("resolution", [64, 128])
def test_the_middle_of_a_uniform_disc_falls_below_its_rim(resolution: int) -> None:
    config = BeamHardening(pixel_mm=4.0, resolution=resolution)
    hardened = config.apply(water(), {"strength": torch.tensor([0.5])})[0, 0]
    middle = hardened[44:52, 44:52].mean()
    rim = torch.stack([hardened[48, 48 + 33], hardened[48, 48 - 34], hardened[48 + 33, 48], hardened[48 - 34, 48]]).mean()
    assert middle < rim - 20
    # All the way: a cup. Rings of 5 pixels, from the middle outwards.
    place = torch.arange(96) + 0.5 - 48
    radius = (place[:, None] ** 2 + place**2).sqrt()
    rings = torch.stack([hardened[(radius >= low) & (radius < low + 5)].mean() for low in range(0, 35, 5)])
    assert (rings.diff() > 0).all()


def test_at_full_strength_thirty_centimetres_of_water_lose_a_fifth() -> None:
    p = torch.tensor([[6.0]])
    taken = BeamHardening().hardening(p, torch.ones(1))
    assert (-taken / p).item() == pytest.approx(0.2, abs=0.05)


def test_the_artefact_hardly_depends_on_the_grid_and_the_directions_it_is_computed_with() -> None:
    strength = torch.tensor([0.5])
    body = water()
    body[0, 0, 40:46, 30:36] = 1000.0
    coarse = BeamHardening(pixel_mm=4.0).artefact(body[0], strength)[0]
    fine = BeamHardening(pixel_mm=4.0, resolution=96, angles=240).artefact(body[0], strength)[0]
    inside = disc(96, 34, 1.0, 0.0)[0] > 0
    assert (coarse - fine)[inside].abs().mean() < 0.05 * fine[inside].abs().mean()


def test_every_slice_of_a_volume_is_a_scan_of_its_own() -> None:
    config = BeamHardening(pixel_mm=4.0)
    volume = torch.stack([water()[0, 0], torch.full((96, 96), -1000.0)])[None, None].expand(2, 1, 2, 96, 96)
    result = config.apply(volume, {"strength": torch.tensor([0.5, 0.1])})
    assert torch.equal(result[:, :, 1], volume[:, :, 1]), "air alone hardens nothing"
    for row, strength in enumerate((0.5, 0.1)):
        one = config.apply(water(), {"strength": torch.tensor([strength])})
        torch.testing.assert_close(result[row : row + 1, :, 0], one)


@pytest.mark.parametrize(
    "wrong",
    [{"weights": (0.5, 0.4)}, {"kappas": (0.5, 1.4)}, {"kappas": (0.5, 1.0, 1.5)}, {"strength": (0, 4)}],
)
def test_a_spectrum_that_is_none_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"add up to 1|one weight for each|negative"):
        BeamHardening(**wrong)


# Cupping


def test_a_cup_is_deepest_in_the_middle_and_ends_at_the_rim() -> None:
    body = torch.full((1, 1, 41, 61), -1000.0)
    place_y, place_x = torch.arange(41.0) - 20, torch.arange(61.0) - 35
    squared = place_y[:, None] ** 2 + place_x**2
    body[0, 0, squared <= 225] = 30.0
    result = Cupping().apply(body, {"depth": torch.tensor([50.0])})
    expected = torch.where(squared <= 225, 30 - 50 * (1 - squared / 225), -1000.0)
    torch.testing.assert_close(result[0, 0], expected)


def test_cups_of_volumes_are_those_of_their_slices_and_air_has_none() -> None:
    volume = -1000 + 1100 * (magnitudes(2, 1, 3, 20, 22) > 0.7)
    volume[:, :, 1] = -1000.0
    parameters = Cupping().sample(keys_of(2), (3, 20, 22))
    result = Cupping().apply(volume, parameters)
    assert torch.equal(result[:, :, 1], volume[:, :, 1])
    assert torch.equal(result[:, :, 2], Cupping().apply(volume[:, :, 2], parameters))
    assert not torch.equal(result[:, :, 2], volume[:, :, 2])


# Window


def test_the_window_that_is_meant_clips_and_does_nothing_else() -> None:
    ramp = torch.linspace(-1000, 1000, 401).view(1, 1, 1, -1)
    parameters = {"centre": torch.tensor([40.0]), "width": torch.tensor([400.0])}
    torch.testing.assert_close(Window().apply(ramp, parameters), ramp.clamp(-160, 240))


def test_the_ends_of_another_window_are_the_ends_of_the_one_that_is_meant() -> None:
    ends = torch.tensor([[44 - 240.0, 44.0, 44 + 240.0, 44 + 120.0, 3000.0]]).view(1, 1, 1, -1)
    result = Window().apply(ends, {"centre": torch.tensor([44.0]), "width": torch.tensor([480.0])})
    torch.testing.assert_close(result.flatten(), torch.tensor([-160.0, 40.0, 240.0, 140.0, 240.0]))


def test_windows_stay_within_ten_and_twenty_percent() -> None:
    parameters = Window(centre=-600, width=1500).sample(keys_of(3000), (8, 8))
    assert -660 <= parameters["centre"].min() < -657
    assert -543 < parameters["centre"].max() <= -540
    assert 1200 <= parameters["width"].min() < 1203
    assert 1797 < parameters["width"].max() <= 1800


# Counts of quanta


@pytest.mark.parametrize(("mean", "exact"), [(5.0, 0.97), (20.0, 0.99), (100.0, 0.99), (2000.0, 0.99)])
def test_counts_are_the_quantiles_of_the_poisson_distribution(mean: float, exact: float) -> None:
    keys, num = keys_of(1), 100_000
    z = noise.normal(keys, (num,)).double().numpy()
    quantiles = poisson.ppf(norm.cdf(z), mean)
    counts = poisson_counts(torch.full((1, num), mean), keys).numpy()
    assert (counts == quantiles).mean() > exact
    assert np.abs(counts - quantiles).max() <= 1
    assert counts.mean() == pytest.approx(mean, rel=0.01)
    assert counts.var() == pytest.approx(mean, rel=0.02)


def test_dense_parts_are_noisier_by_the_root_of_what_they_let_through() -> None:
    """x' = (white / a) ln(photons / N): deviation (white / a) / sqrt(N)."""
    config = PoissonNoise(photons=(10_000, 10_000))
    image = torch.cat([torch.full((1, 1, 200, 200), grey) for grey in (0.0, 127.5, 255.0)])
    result = config.apply(image, config.sample(keys_of(3), (200, 200)))
    for row, grey, count in zip(result, (0.0, 127.5, 255.0), (10_000, 1_000, 100), strict=True):
        expected = 255 / math.log(100) / math.sqrt(count)
        assert row.std().item() == pytest.approx(expected, rel=0.03)
        assert row.mean().item() == pytest.approx(grey, abs=0.02 * expected + 255 / math.log(100) / count)


def test_with_quanta_without_end_there_is_no_noise() -> None:
    image = 255 * magnitudes(2, 1, 16, 16)
    config = PoissonNoise(photons=(1e12, 1e12))
    torch.testing.assert_close(config.apply(image, config.sample(keys_of(2), (16, 16))), image, rtol=0, atol=0.01)
