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

Dimensions = Literal[2, 3]
_CONVOLUTION: dict[Dimensions, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class Image2dConfig(Spec):
    """Stem at half the resolution, then one residual block per width, each after the first halving the resolution again."""

    kind: Literal["image2d"] = "image2d"
    widths: tuple[int, ...] = Field((16, 32, 64), min_length=1)
    groups: int = Field(8, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    projection_dropout: float = Field(0.2, ge=0, lt=1)

    def build(self, spec: ModalitySpec, width: int) -> "ResidualEncoder":
        """The encoder of one image modality, with features of the given width.

        Raises:
            SpecError: the modality is of another kind.
        """
        if not isinstance(spec, ImageSpec):
            raise wrong_kind(self.kind, reads="image", spec=spec)
        return ResidualEncoder(
            2,
            channels=spec.channels,
            widths=self.widths,
            groups=self.groups,
            dropout=self.dropout,
            projection_dropout=self.projection_dropout,
            width=width,
        )


class ResidualEncoder(nn.Module):
    """(B, C, H, W), or (B, C, D, H, W), to (S, B, width).

    Stem at half the resolution, then one residual block per width, each after the first halving the resolution again. Dropout
    drops whole channels after each block, and single features before the projection.
    """

    def __init__(
        self,
        dimensions: Dimensions,
        *,
        channels: int,
        widths: tuple[int, ...],
        groups: int,
        dropout: float,
        projection_dropout: float,
        width: int,
    ) -> None:
        super().__init__()
        first = widths[0]
        self.stem = _CONVOLUTION[dimensions](channels, first, 3, stride=2, padding=1, bias=False)
        self.norm = group_norm(groups, first)
        inputs = (first, *widths[:-1])
        strides = (1, *[2] * (len(widths) - 1))
        self.blocks = nn.ModuleList(
            ResidualBlock(a, b, stride, groups, dimensions) for a, b, stride in zip(inputs, widths, strides, strict=True)
        )
        self.dropouts = nn.ModuleList(MCDropout(dropout, channels=True) for _ in widths)
        self.projection = Projection(2 * widths[-1], width, projection_dropout)
        self.places = tuple(range(-dimensions, 0))

    def forward(self, image: Tensor, keys: Tensor) -> Tensor:
        """Features of every pass."""
        hidden = functional.relu(self.norm(self.stem(image))).unsqueeze(0)
        for block, dropout in zip(self.blocks, self.dropouts, strict=True):
            hidden = dropout(per_pass(block, hidden), keys)
        # The mean says how much of something there is, the maximum whether it is there at all: a small finding drowns in a mean.
        pooled = torch.cat([hidden.mean(self.places), hidden.amax(self.places)], dim=-1)
        features: Tensor = self.projection(pooled, keys)
        return features

    def checkpointed_blocks(self) -> nn.ModuleList:
        """See HasBlocks."""
        return self.blocks


class ResidualBlock(nn.Module):
    """conv - norm - relu - conv - norm, plus the input (through a 1x1 convolution where shapes differ), then relu."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, dimensions: Dimensions = 2) -> None:
        super().__init__()
        convolution = _CONVOLUTION[dimensions]
        self.conv1 = convolution(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = group_norm(groups, outputs)
        self.conv2 = convolution(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = group_norm(groups, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """Maps (N, inputs, ..., H, W) to (N, outputs, ..., H / stride, W / stride)."""
        hidden = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(values)))))
        return functional.relu(hidden + self.shortcut(values))


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """GroupNorm with the largest number of groups that divides the channels and is no more than asked for."""
    return nn.GroupNorm(next(g for g in range(min(groups, channels), 0, -1) if channels % g == 0), channels)
