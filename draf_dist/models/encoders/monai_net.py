"""MONAI's ResNet-10, ResNet-18 and DenseNet121 in 2-D and 3-D, with norms that know no batch and MC dropout after each stage."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.models.encoders.image2d import Dimensions, group_norm
from draf_dist.models.encoders.kinds import wrong_kind
from draf_dist.models.layers import Projection
from draf_dist.models.mc import MCDropout, per_pass
from draf_dist.schema.modality import ImageSpec, ModalitySpec, VolumeSpec

Network = Literal["resnet10", "resnet18", "densenet121"]
# The gradient of a convolution over 7 x 7 x 7 of fewer planes writes past its memory on a CPU (seen with torch 2.13: NaN, crashes).
_LEAST_DEPTH = 8


class MonaiConfig(Spec):
    """norm: `group`, or `instance`, which has one group a channel and so forgets how strong each channel was in an image."""

    kind: Literal["monai"] = "monai"
    network: Network = "resnet10"
    norm: Literal["group", "instance"] = "group"
    groups: int = Field(8, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    projection_dropout: float = Field(0.2, ge=0, lt=1)

    def build(self, spec: ModalitySpec, width: int) -> "MonaiEncoder":
        """The encoder of one modality of images or volumes, with features of the given width.

        Raises:
            SpecError: the modality is of another kind, or too small for the network.
        """
        if isinstance(spec, ImageSpec):
            self._check_size(spec.name, (spec.height, spec.width))
            return MonaiEncoder(self, 2, spec.channels, width)
        if isinstance(spec, VolumeSpec):
            self._check_size(spec.name, spec.delivered)
            return MonaiEncoder(self, 3, spec.channels, width)
        raise wrong_kind(self.kind, reads="image or volume", spec=spec)

    def _check_size(self, name: str, sides: Sequence[int]) -> None:
        # The norm of a single number is 0, whatever it is.
        least = 2 if self.norm == "instance" else 1
        problem = f"images of which the last of its maps has {least} or more places"
        if len(sides) == 3 and sides[0] < _LEAST_DEPTH:
            problem = f"volumes at least {_LEAST_DEPTH} deep"
        elif math.prod(_last_side(self.network, side) for side in sides) >= least:
            return
        found, remedy = " x ".join(map(str, sides)), "Choose another network, norm group, or image2d or volume3d."
        raise SpecError(explain(f"model.encoders: {self.network} for {name}", expected=problem, found=found, remedy=remedy))


class MonaiEncoder(nn.Module):
    """(B, C, H, W), or (B, C, D, H, W), to (S, B, width).

    Stem at a quarter of the resolution, four stages, mean over the places, projection. MONAI 1.6.1 hands `norm` on to the stem of
    a ResNet alone, so BatchNorm is replaced here and not by its argument.
    """

    def __init__(self, config: MonaiConfig, dimensions: Dimensions, channels: int, width: int) -> None:
        super().__init__()
        stem, stages, outputs = _parts(config.network, dimensions, channels)
        self.stem = nn.Sequential(*stem)
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        _replace_norms(self, None if config.norm == "instance" else config.groups)
        self.dropouts = nn.ModuleList(MCDropout(config.dropout, channels=True) for _ in stages)
        self.projection = Projection(outputs, width, config.projection_dropout)

    def forward(self, image: Tensor, keys: Tensor) -> Tensor:
        """Features of every pass."""
        hidden = self.stem(image).unsqueeze(0)
        for stage, dropout in zip(self.stages, self.dropouts, strict=True):
            hidden = dropout(per_pass(stage, hidden), keys)
        features: Tensor = self.projection(hidden.flatten(3).mean(-1), keys)
        return features

    def checkpointed_blocks(self) -> nn.ModuleList:
        """See HasBlocks."""
        return self.stages


def _parts(network: Network, dimensions: Dimensions, channels: int) -> tuple[list[nn.Module], list[list[nn.Module]], int]:
    """The layers of the stem, those of every stage, and the channels that come out of the last."""
    if network == "densenet121":
        return _densenet(dimensions, channels)
    # Takes seconds to import, and few jobs need it.
    from monai.networks.nets.resnet import resnet10, resnet18

    make = resnet10 if network == "resnet10" else resnet18
    # A stem of stride 2 is the ResNet of He et al. 2016; MONAI's default of 1 has eight times the voxels in every stage.
    net = make(spatial_dims=dimensions, n_input_channels=channels, conv1_t_stride=2, feed_forward=False)
    return [net.conv1, net.bn1, net.act, net.maxpool], [[net.layer1], [net.layer2], [net.layer3], [net.layer4]], 512


def _densenet(dimensions: Dimensions, channels: int) -> tuple[list[nn.Module], list[list[nn.Module]], int]:
    from monai.networks.nets.densenet import DenseNet121

    layers = dict(DenseNet121(dimensions, channels, out_channels=1).features.named_children())
    stem = [layers[name] for name in ("conv0", "norm0", "relu0", "pool0")]
    stages = [[layers[f"denseblock{number}"], layers[f"transition{number}"]] for number in (1, 2, 3)]
    return stem, [*stages, [layers["denseblock4"], layers["norm5"], nn.ReLU()]], 1024


def _replace_norms(module: nn.Module, groups: int | None) -> None:
    """GroupNorm in place of every BatchNorm, whose statistics would couple the rows; as many parameters. None: one a channel."""
    for name, part in module.named_children():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, group_norm(part.num_features if groups is None else groups, part.num_features))
        else:
            _replace_norms(part, groups)


def _last_side(network: Network, side: int) -> int:
    """The side of the last map: a 32nd, rounded up by the strides of convolutions, down by the means of a DenseNet."""
    quarter = -(-side // 4)
    return quarter // 8 if network == "densenet121" else -(-quarter // 8)
