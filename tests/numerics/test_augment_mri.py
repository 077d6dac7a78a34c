"""O12, and the closed forms of what MRI scanners do to images: k-space, ringing, magnitudes of noise, coils."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import legendre
from physics_inputs import keys_of, magnitudes

from draf_dist.augment import BiasField, GibbsRinging, KSpaceUndersampling, RicianNoise

# k-space


def test_oracle_of_the_ramp_whose_rows_become_their_means() -> None:
    ramp = torch.arange(16.0).view(1, 1, 4, 4)
    only_dc = torch.tensor([[False, False, True, False]])
    result = KSpaceUndersampling().apply(ramp, {"mask": only_dc})
    expected = torch.tensor([1.5, 5.5, 9.5, 13.5]).view(4, 1).expand(4, 4)
    torch.testing.assert_close(result[0, 0], expected, rtol=0, atol=1e-6)


def test_along_the_other_axis_columns_become_their_means() -> None:
    ramp = torch.arange(16.0).view(1, 1, 4, 4)
    only_dc = torch.tensor([[False, False, True, False]])
    result = KSpaceUndersampling(phase_axis="height").apply(ramp, {"mask": only_dc})
    torch.testing.assert_close(result[0, 0], torch.tensor([6.0, 7.0, 8.0, 9.0]).expand(4, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 1, 32, 40), (3, 2, 17, 23), (2, 1, 5, 16, 21)])
def test_an_acceleration_of_one_changes_nothing(shape: tuple[int, ...]) -> None:
    config, image = KSpaceUndersampling(accelerations=(1,)), magnitudes(*shape)
    parameters = config.sample(keys_of(shape[0]), shape[2:])
    assert parameters["mask"].all()
    torch.testing.assert_close(config.apply(image, parameters), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 1, 24, 30), (4, 2, 9, 25), (4, 1, 3, 16, 21)])
@pytest.mark.parametrize("phase_axis", ["height", "width"])
def test_it_is_the_shifted_transform_of_both_axes_masked_and_inverted(shape: tuple[int, ...], phase_axis: str) -> None:
    config = KSpaceUndersampling.model_validate({"phase_axis": phase_axis})
    image = magnitudes(*shape)
    parameters = config.sample(keys_of(shape[0]), shape[2:])
    mask = parameters["mask"].numpy()
    mask = mask.reshape(len(mask), *([1] * (len(shape) - 2)), -1)
    mask = np.swapaxes(mask, -1, -2) if phase_axis == "height" else mask
    spectrum = np.fft.fftshift(np.fft.fft2(image.double().numpy()), axes=(-2, -1))
    expected = np.abs(np.fft.ifft2(np.fft.ifftshift(spectrum * mask, axes=(-2, -1))))
    np.testing.assert_allclose(config.apply(image, parameters).numpy(), expected, rtol=0, atol=1e-6)


def test_the_energy_that_is_left_is_that_of_the_measured_lines() -> None:
    """Parseval: sum |x'|^2 = 1/N sum over measured lines of |X|^2."""
    config, image = KSpaceUndersampling(), magnitudes(8, 1, 20, 31)
    parameters = config.sample(keys_of(8), (20, 31))
    spectrum = np.fft.fftshift(np.fft.fft(image.double().numpy()), axes=-1)
    measured = parameters["mask"].numpy()[:, None, None]
    expected = (np.abs(spectrum) ** 2 * measured).sum((1, 2, 3)) / 31
    energy = config.apply(image, parameters).square().sum((1, 2, 3))
    np.testing.assert_allclose(energy.numpy(), expected, rtol=1e-5)
    assert (energy < image.square().sum((1, 2, 3))).all()


@pytest.mark.parametrize(
    ("lines", "fraction", "centre"), [(100, 0.08, 8), (100, 0.07, 7), (224, 0.08, 18), (33, 0.04, 2), (5, 1.0, 5)]
)
def test_the_centre_is_always_measured(lines: int, fraction: float, centre: int) -> None:
    """With an acceleration that leaves no other line: ceil(fc N) lines about frequency 0."""
    config = KSpaceUndersampling(accelerations=(1000,), centre_fractions=(fraction,))
    mask = config.sample(keys_of(50), (8, lines))["mask"]
    assert (mask.sum(dim=1) == centre).all()
    place = mask[0].nonzero().flatten()
    assert torch.equal(place, torch.arange(centre) + int(place[0]))
    assert lines // 2 in place.tolist()
    assert abs(int(place[0] + place[-1]) - 2 * (lines // 2)) <= 1


@pytest.mark.parametrize("acceleration", [2, 4, 6, 8])
def test_one_line_in_r_is_measured(acceleration: int) -> None:
    mask = KSpaceUndersampling(accelerations=(acceleration,)).sample(keys_of(2000), (8, 200))["mask"]
    assert mask.float().mean().item() == pytest.approx(1 / acceleration, rel=0.02)


def test_accelerations_and_centres_are_drawn_independently_from_the_lists() -> None:
    parameters = KSpaceUndersampling().sample(keys_of(8000), (8, 100))
    cells = torch.stack([parameters["acceleration"], parameters["centre_fraction"]], dim=1)
    values, counts = cells.unique(dim=0, return_counts=True)
    assert [tuple(pair) for pair in values.tolist()] == [
        (r, pytest.approx(fc)) for r in (2.0, 4.0, 6.0, 8.0) for fc in (0.04, 0.08)
    ]
    assert (counts - 1000).abs().max() < 130


def test_one_mask_is_shared_by_all_slices_and_channels() -> None:
    config, volume = KSpaceUndersampling(), magnitudes(2, 2, 4, 12, 26)
    parameters = config.sample(keys_of(2), (4, 12, 26))
    whole = config.apply(volume, parameters)
    for channel in range(2):
        for depth in range(4):
            one = config.apply(volume[:, channel : channel + 1, depth], parameters)
            torch.testing.assert_close(whole[:, channel : channel + 1, depth], one)


def test_after_standardisation_it_would_fold_the_signs() -> None:
    config = KSpaceUndersampling(accelerations=(1,))
    z = magnitudes(2, 1, 16, 16) - 0.5
    torch.testing.assert_close(config.apply(z, config.sample(keys_of(2), (16, 16))), z.abs(), rtol=0, atol=1e-6)


# Gibbs ringing


def test_a_k_space_kept_whole_changes_nothing() -> None:
    for size in ((16, 20), (17, 23), (3, 9, 12)):
        image = magnitudes(3, 1, *size)
        torch.testing.assert_close(GibbsRinging().apply(image, {"kept": torch.ones(3)}), image, rtol=0, atol=1e-6)


def test_an_edge_overshoots_by_nine_percent_of_its_height_whatever_is_kept() -> None:
    """Wilbraham and Gibbs: the ripple of a truncated Fourier series is 8.95 % of the jump."""
    edge = torch.full((2, 1, 8, 4096), 1.0)
    edge[..., 1024:3072] = 3.0
    result = GibbsRinging().apply(edge, {"kept": torch.tensor([0.02, 0.05])})
    for row in result:
        assert ((row.max() - 3) / 2).item() == pytest.approx(0.0895, abs=0.002)
    torch.testing.assert_close(result.mean((1, 2, 3)), edge.mean((1, 2, 3)))


def test_what_is_kept_is_a_rectangle_of_both_axes() -> None:
    image = magnitudes(1, 1, 32, 32) + 5
    result = GibbsRinging().apply(image, {"kept": torch.tensor([0.5])})
    spectrum = torch.fft.fft2(result)[0, 0].abs()
    frequency = torch.fft.fftfreq(32).abs()
    outside = (frequency[:, None] > 0.25) | (frequency > 0.25)
    assert spectrum[outside].max() < 1e-3
    torch.testing.assert_close(spectrum[~outside], torch.fft.fft2(image)[0, 0].abs()[~outside], rtol=1e-4, atol=1e-3)


# Rician noise


def test_the_second_moment_of_a_rician_value() -> None:
    """E y^2 = x^2 + 2 s^2, s in units of the greatest value."""
    image = torch.full((4, 1, 200, 200), 0.3)
    image[..., 0, 0] = 2.0
    config = RicianNoise(sigma=(0.1, 0.1))
    result = config.apply(image, config.sample(keys_of(4), (200, 200)))
    assert result.square()[..., 1:, :].mean().item() == pytest.approx(0.3**2 + 2 * 0.2**2, rel=0.01)
    assert (result >= 0).all()


def test_air_becomes_rayleigh() -> None:
    """Where there is no signal: mean s sqrt(pi / 2), variance s^2 (2 - pi / 2)."""
    image = torch.zeros(4, 1, 200, 200)
    image[..., 0, 0] = 1.0
    config = RicianNoise(sigma=(0.05, 0.05))
    air = config.apply(image, config.sample(keys_of(4), (200, 200)))[..., 1:, :]
    assert air.mean().item() == pytest.approx(0.05 * math.sqrt(math.pi / 2), rel=0.01)
    assert air.var().item() == pytest.approx(0.05**2 * (2 - math.pi / 2), rel=0.02)


def test_no_noise_is_no_change_and_the_scale_of_the_numbers_does_not_matter() -> None:
    image = magnitudes(3, 1, 16, 17)
    torch.testing.assert_close(RicianNoise().apply(image, {"sigma": torch.zeros(3), "key": keys_of(3)}), image)
    parameters = RicianNoise().sample(keys_of(3), (16, 17))
    torch.testing.assert_close(RicianNoise().apply(image * 512, parameters), RicianNoise().apply(image, parameters) * 512)


# Bias field


def places(length: int) -> np.ndarray:
    return (np.arange(length) + 0.5) / length * 2 - 1


@pytest.mark.parametrize("degree", [1, 3, 5])
def test_the_field_is_that_of_numpys_legendre_series(degree: int) -> None:
    config = BiasField(degree=degree)
    flat = config.sample(keys_of(3), (12, 17))
    field = config.apply(torch.ones(3, 1, 12, 17), flat)
    deep = config.sample(keys_of(3), (5, 12, 17))
    fields = config.apply(torch.ones(3, 2, 5, 12, 17), deep)
    for row in range(3):
        expected = legendre.leggrid2d(places(12), places(17), flat["coefficients"][row].double().numpy())
        np.testing.assert_allclose(field[row, 0].log().numpy(), expected, rtol=0, atol=1e-5)
        expected = legendre.leggrid3d(places(5), places(12), places(17), deep["coefficients"][row].double().numpy())
        np.testing.assert_allclose(fields[row, 1].log().numpy(), expected, rtol=0, atol=1e-5)


def test_coefficients_are_within_their_bound_and_of_degree_one_to_three() -> None:
    coefficients = BiasField().sample(keys_of(500), (8, 8, 8))["coefficients"]
    degree = sum(torch.meshgrid(*([torch.arange(4)] * 3), indexing="ij"))
    used = (degree >= 1) & (degree <= 3)
    assert used.sum() == 19
    assert (coefficients[:, ~used] == 0).all()
    assert 0.299 < coefficients.abs().max() <= 0.3
    assert coefficients[:, used].std().item() == pytest.approx(0.3 / math.sqrt(3), rel=0.02)


def test_a_field_is_positive_and_leaves_air_at_zero() -> None:
    config = BiasField()
    image = magnitudes(20, 1, 16, 16)
    image[..., :8] = 0
    result = config.apply(image, config.sample(keys_of(20), (16, 16)))
    assert (result[..., :8] == 0).all()
    assert ((result > 0) == (image > 0)).all()
