"""Encoders of volumes: sizes of the spec on the meta device, norms without a batch, and what they refuse."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.errors import SpecError
from draf_dist.models.encoders import Image2dConfig, MonaiConfig, Volume3dConfig
from draf_dist.models.encoders.image2d import group_norm
from draf_dist.models.encoders.monai_net import MonaiEncoder
from draf_dist.models.mc import MCDropout, name_streams
from draf_dist.schema.modality import ImageSpec, ModalitySpec, VolumeSpec

IMAGE = ImageSpec(name="cxr", height=224, width=224)


def volume(*sides: int, channels: int = 1) -> VolumeSpec:
    return VolumeSpec(name="ct", channels=channels, spacing_mm=(1, 1, 1), patch=sides, chunk=(8, 8, 8))


def keys(passes: int, rows: int) -> Tensor:
    return noise.sample_keys(0, "model", None, torch.arange(rows), passes)


def on_meta(config: MonaiConfig, spec: ModalitySpec) -> MonaiEncoder:
    with torch.device("meta"):
        return config.build(spec, 128)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("norm", ["group", "instance"])
@pytest.mark.parametrize(
    ("network", "spec", "expected"),
    [
        ("resnet10", volume(96, 96, 96), 14_422_080),
        ("resnet18", volume(96, 96, 96), 33_226_560),
        ("densenet121", volume(96, 96, 96), 11_373_824),
        ("densenet121", IMAGE, 7_078_784),
    ],
)
def test_counts_are_those_of_the_spec(network: str, spec: ModalitySpec, expected: int, norm: str) -> None:
    encoder = on_meta(MonaiConfig.model_validate({"network": network, "norm": norm}), spec)
    # The spec counts the network up to the linear layer to 128; the LayerNorm after it is 256 more.
    assert count(encoder) - count(encoder.projection.norm) == expected


@pytest.mark.parametrize("network", ["resnet10", "resnet18", "densenet121"])
def test_every_batch_norm_was_replaced(network: str) -> None:
    encoder = on_meta(MonaiConfig.model_validate({"network": network}), volume(96, 96, 96))
    norms = [part for part in encoder.modules() if isinstance(part, nn.GroupNorm)]
    assert not [part for part in encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert {part.num_groups for part in norms} == {8}
    assert len(norms) == {"resnet10": 12, "resnet18": 20, "densenet121": 121}[network]
    instance = on_meta(MonaiConfig.model_validate({"network": network, "norm": "instance"}), volume(96, 96, 96))
    assert all(part.num_groups == part.num_channels for part in instance.modules() if isinstance(part, nn.GroupNorm))


def test_one_group_a_channel_is_instance_norm() -> None:
    values = torch.randn(3, 4, 2, 3, 5)
    torch.testing.assert_close(group_norm(4, 4)(values), nn.InstanceNorm3d(4, affine=True)(values))


def test_groups_divide_the_channels() -> None:
    assert [group_norm(8, channels).num_groups for channels in (16, 12, 7, 4, 13)] == [8, 6, 7, 4, 1]


def stage_shapes(encoder: MonaiEncoder, values: Tensor) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    for dropout in encoder.dropouts:
        dropout.register_forward_pre_hook(lambda _module, inputs: shapes.append(tuple(inputs[0].shape[2:])))
    encoder(values, keys(2, 1))
    return shapes


def test_stages_are_those_of_the_papers() -> None:
    resnet = MonaiConfig().build(volume(16, 16, 33), 8)
    assert stage_shapes(resnet, torch.randn(1, 1, 16, 16, 33)) == [(64, 4, 4, 9), (128, 2, 2, 5), (256, 1, 1, 3), (512, 1, 1, 2)]
    densenet = MonaiConfig(network="densenet121").build(ImageSpec(name="cxr", height=32, width=64), 8)
    assert stage_shapes(densenet, torch.randn(1, 1, 32, 64)) == [(128, 4, 8), (256, 2, 4), (512, 1, 2), (1024, 1, 2)]


@pytest.mark.parametrize(
    ("options", "spec", "problem"),
    [
        ({"network": "densenet121"}, volume(28, 64, 64), "densenet121 for ct: expected .* 1 or more places, found 28 x 64 x 64"),
        ({"norm": "instance"}, volume(32, 32, 32), "2 or more places, found 32 x 32 x 32"),
        ({}, volume(7, 64, 64), "volumes at least 8 deep, found 7 x 64 x 64"),
    ],
)
def test_what_is_too_small_is_refused(options: dict[str, str], spec: ModalitySpec, problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        on_meta(MonaiConfig.model_validate(options), spec)


def test_the_smallest_that_are_not_refused_run() -> None:
    cases: list[tuple[MonaiConfig, ModalitySpec, tuple[int, ...]]] = [
        (MonaiConfig(network="densenet121"), ImageSpec(name="cxr", height=29, width=29), (29, 29)),
        (MonaiConfig(norm="instance"), volume(8, 8, 33), (8, 8, 33)),
        (MonaiConfig(), volume(8, 1, 1), (8, 1, 1)),
    ]
    for config, spec, sides in cases:
        features = config.build(spec, 8)(torch.randn(1, 1, *sides), keys(2, 1))
        assert features.isfinite().all()
        assert not torch.equal(features[0], features[1])


def test_channel_dropout_drops_whole_channels_of_volumes() -> None:
    dropout = MCDropout(0.5, channels=True)
    name_streams(nn.Sequential(dropout))
    dropped = dropout(torch.ones(1, 20, 8, 3, 4, 5), keys(2, 20))
    assert dropped.shape == (2, 20, 8, 3, 4, 5)
    per_channel = dropped.flatten(-3)
    assert (per_channel == per_channel[..., :1]).all()
    assert 0.3 < (dropped == 0).float().mean() < 0.7


def test_a_volume_of_one_plane_is_read_as_its_middle_weights_read_an_image() -> None:
    """3 x 3 x 3 over a single plane, padded with zeros, is 3 x 3 with the middle of the weights."""
    torch.manual_seed(0)
    cube = Volume3dConfig(widths=(4, 8), groups=2, dropout=0.0, projection_dropout=0.0).build(volume(1, 12, 10), 6)
    flat = Image2dConfig(widths=(4, 8), groups=2, dropout=0.0, projection_dropout=0.0).build(
        ImageSpec(name="cxr", height=12, width=10), 6
    )
    flat.load_state_dict(
        {name: value[:, :, value.shape[2] // 2] if value.dim() == 5 else value for name, value in cube.state_dict().items()}
    )
    values = torch.randn(3, 1, 12, 10)
    torch.testing.assert_close(cube(values.unsqueeze(2), keys(1, 3)), flat(values, keys(1, 3)), atol=1e-5, rtol=1e-5)


BROKEN_TORCHVISION = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")

sys.meta_path.insert(0, Broken())
import torch
from draf_dist.models.encoders import MonaiConfig
from draf_dist.schema.modality import ImageSpec
assert "monai" not in sys.modules
with torch.device("meta"):
    for network in ("resnet10", "densenet121"):
        MonaiConfig(network=network).build(ImageSpec(name="cxr", height=64, width=64), 8)
assert "monai" in sys.modules and "torchvision" not in sys.modules
"""


def test_torchvision_is_not_needed_and_monai_only_where_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN_TORCHVISION], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
