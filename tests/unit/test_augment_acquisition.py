"""What scanners do to images: the contract of every transform of stored values, on images and volumes of odd sizes."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.augment import PoissonNoise, Transform
from draf_dist.augment.presets import CtTransform, MriTransform

KINDS = (*get_args(get_args(CtTransform)[0]), *get_args(get_args(MriTransform)[0]), PoissonNoise)
CT = {"beam_hardening", "cupping", "window"}


def keys_of(count: int) -> Tensor:
    return noise.sample_keys(9, "acquisition", None, torch.arange(count), 1)[0]


def stored(config: Transform, shape: tuple[int, ...]) -> Tensor:
    """Values as the scanner would store them: HU from air to bone, or from 0 to 255."""
    uniform = noise.uniform(keys_of(shape[0]), shape[1:])
    return uniform * 2000 - 1000 if config.kind in CT else uniform * 255


@pytest.mark.parametrize("config", [kind() for kind in KINDS], ids=lambda c: c.kind)
@pytest.mark.parametrize("shape", [(6, 1, 40, 48), (6, 2, 33, 21), (6, 1, 3, 17, 22)], ids=["even", "odd", "volume"])
def test_contract_of_an_acquisition(config: Transform, shape: tuple[int, ...]) -> None:
    image = stored(config, shape)
    before = image.clone()
    parameters = config.sample(keys_of(6), shape[2:])
    result = config.apply(image, parameters)
    assert torch.equal(image, before)
    assert result.shape == image.shape
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()
    assert not torch.equal(result, image)
    assert torch.equal(config.apply(image, parameters), result), "the record repeats it"
    assert {values.shape[0] for values in parameters.values()} == {6}
    for values in parameters.values():
        assert not torch.equal(values[0], values[1]) or values.unique().numel() < 5
    for start, stop in ((3, 4), (0, 2), (1, 6), (5, 6)):
        part = config.sample(keys_of(6)[start:stop], shape[2:])
        assert all(torch.equal(values, parameters[name][start:stop]) for name, values in part.items())
        assert torch.equal(config.apply(image[start:stop], part), result[start:stop]), "no row depends on another"


@pytest.mark.parametrize("config", [kind() for kind in KINDS], ids=lambda c: c.kind)
@pytest.mark.parametrize("value", [0.0, 100.0])
def test_a_constant_image_stays_finite(config: Transform, value: float) -> None:
    parameters = config.sample(keys_of(2), (3, 9, 11))
    assert torch.isfinite(config.apply(torch.full((2, 1, 3, 9, 11), value), parameters)).all()


@pytest.mark.parametrize("config", [kind() for kind in KINDS if kind().kind not in CT], ids=lambda c: c.kind)
def test_magnitudes_stay_magnitudes(config: Transform) -> None:
    image = stored(config, (4, 1, 24, 25))
    # A count above the expected one is a grey value below 0, by a deviation of the thinnest parts.
    least = -10 if config.kind == "poisson_noise" else 0
    assert config.apply(image, config.sample(keys_of(4), (24, 25))).min() >= least
