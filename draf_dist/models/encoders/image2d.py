"""A small residual network for 2-D images with GroupNorm and MC dropout (own; spec 1.2 fixes the dropout and the projection)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.models.encoders.kinds import wrong_kind
from draf_dist.models.layers import Projection
from draf_dist.models.mc import MCDropout, per_pass
from draf_dist.schema.modality import ImageSpec, ModalitySpec


class Image2dConfig(Spec):
    """Stem at half the resolution, then one residual block per width, each after the first halving the resolution again."""

    kind: Literal["image2d"] = "image2d"
    widths: tuple[int, ...] = Field((16, 32, 64), min_length=1)
    groups: int = Field(8, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    projection_dropout: float = Field(0.2, ge=0, lt=1)

    def build(self, spec: ModalitySpec, width: int) -> "Image2dEncoder":
        """The encoder of one image modality, with features of the given width.

        Raises:
            SpecError: the modality is of another kind.
        """
        if not isinstance(spec, ImageSpec):
            raise wrong_kind(self.kind, reads="image", spec=spec)
        return Image2dEncoder(self, spec, width)


class Image2dEncoder(nn.Module):
    """(B, C, H, W) to (S, B, width). Dropout drops whole channels after each block: 0.1, and 0.2 before the projection."""

    def __init__(self, config: Image2dConfig, spec: ImageSpec, width: int) -> None:
        super().__init__()
        first = config.widths[0]
        self.stem = nn.Conv2d(spec.channels, first, 3, stride=2, padding=1, bias=False)
        self.norm = _group_norm(config.groups, first)
        inputs = (first, *config.widths[:-1])
        strides = (1, *[2] * (len(config.widths) - 1))
        self.blocks = nn.ModuleList(
            ResidualBlock(a, b, stride, config.groups) for a, b, stride in zip(inputs, config.widths, strides, strict=True)
        )
        self.dropouts = nn.ModuleList(MCDropout(config.dropout, channels=True) for _ in config.widths)
        self.projection = Projection(2 * config.widths[-1], width, config.projection_dropout)

    def forward(self, image: Tensor, keys: Tensor) -> Tensor:
        """Features of every pass."""
        hidden = functional.relu(self.norm(self.stem(image))).unsqueeze(0)
        for block, dropout in zip(self.blocks, self.dropouts, strict=True):
            hidden = dropout(per_pass(block, hidden), keys)
        # The mean says how much of something there is, the maximum whether it is there at all: a small finding drowns in a mean.
        pooled = torch.cat([hidden.mean((-2, -1)), hidden.amax((-2, -1))], dim=-1)
        features: Tensor = self.projection(pooled, keys)
        return features

    def checkpointed_blocks(self) -> nn.ModuleList:
        """See HasBlocks."""
        return self.blocks


class ResidualBlock(nn.Module):
    """conv - norm - relu - conv - norm, plus the input (through a 1x1 convolution where shapes differ), then relu."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _group_norm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = _group_norm(groups, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        hidden = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(values)))))
        return functional.relu(hidden + self.shortcut(values))


def _group_norm(groups: int, channels: int) -> nn.GroupNorm:
    # The largest number of groups that divides the channels and is no more than asked for.
    return nn.GroupNorm(next(g for g in range(min(groups, channels), 0, -1) if channels % g == 0), channels)
