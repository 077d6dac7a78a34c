"""The parts of a U-Net (Ronneberger et al. 2015) in 2-D and 3-D: a deterministic encoder, a decoder of variational layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.models.encoders.image2d import Dimensions, ResidualBlock, group_norm
from draf_dist.models.mc import MCDropout, per_pass
from draf_dist.models.variational import (
    Draws,
    PointLayer,
    VariationalConv2d,
    VariationalConv3d,
    VariationalLayer,
    VariationalLinear,
)

WeightName = Literal["gaussian", "point"]


@dataclass(frozen=True)
class LayerOptions:
    """How the layers of decoder and heads are made. dimensions: 2 or 3. dropout: of whole channels, with MC masks."""

    dimensions: Dimensions
    groups: int
    weights: WeightName
    rho_init: float
    dropout: float

    def conv(self, inputs: int, outputs: int, kernel: int, *, bias: bool) -> VariationalLayer | PointLayer:
        """A convolution that keeps the sides."""
        if self.weights == "point":
            return PointLayer(plain_conv(self.dimensions, inputs, outputs, kernel, bias=bias))
        variational = VariationalConv2d if self.dimensions == 2 else VariationalConv3d
        return variational(inputs, outputs, kernel, bias=bias, rho_init=self.rho_init)

    def linear(self, inputs: int, outputs: int, *, bias: bool = True) -> VariationalLayer | PointLayer:
        """A linear map."""
        if self.weights == "point":
            return PointLayer(nn.Linear(inputs, outputs, bias=bias))
        return VariationalLinear(inputs, outputs, bias=bias, rho_init=self.rho_init)


class PyramidEncoder(nn.Module):
    """Stem at half the resolution, then one residual block per width, each after the first halving it again.

    The parameters of the `image2d` and `volume3d` encoders by the same names, without their dropout and projection: what
    pre-training taught those is loaded here.
    """

    def __init__(self, channels: int, widths: Sequence[int], dimensions: Dimensions, groups: int) -> None:
        super().__init__()
        first = widths[0]
        self.stem = plain_conv(dimensions, channels, first, 3, stride=2)
        self.norm = group_norm(groups, first)
        inputs, strides = (first, *widths[:-1]), (1, *[2] * (len(widths) - 1))
        self.blocks = nn.ModuleList(
            ResidualBlock(a, b, stride, groups, dimensions) for a, b, stride in zip(inputs, widths, strides, strict=True)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features (B, width_l, *space / 2^(l + 1)) of an image (B, C, *space), the finest first."""
        hidden = functional.relu(self.norm(self.stem(image)))
        features = []
        for block in self.blocks:
            hidden = block(hidden)
            features.append(hidden)
        return features

    def checkpointed_blocks(self) -> nn.ModuleList:
        """See HasBlocks."""
        return self.blocks


class DecoderBlock(nn.Module):
    """The coarser map at the sides of the skipped one, both through one convolution, norm, relu, MC dropout."""

    def __init__(self, coarse: int, skip: int, outputs: int, options: LayerOptions) -> None:
        super().__init__()
        # The norm takes off what a bias adds.
        self.conv = options.conv(coarse + skip, outputs, 3, bias=False)
        self.norm = group_norm(options.groups, outputs)
        self.dropout = MCDropout(options.dropout, channels=True)

    def forward(self, coarse: Tensor, skip: Tensor, draws: Draws) -> Tensor:
        """Coarse (S or 1, B, C, *less) and skip (B, C', *space) to (S, B, outputs, *space); 1 for S where nothing is drawn."""
        raised = per_pass(lambda flat: functional.interpolate(flat, size=skip.shape[2:], mode="nearest"), coarse)
        joined = torch.cat([raised, skip.expand(raised.shape[0], *skip.shape)], dim=2)
        hidden = functional.relu(per_pass(self.norm, self.conv(joined, draws)))
        result: Tensor = self.dropout(hidden, draws.study)
        return result


class PyramidDecoder(nn.Module):
    """From the coarsest features to the full grid, one block a level; the last skip is the image itself."""

    def __init__(self, channels: int, widths: Sequence[int], options: LayerOptions) -> None:
        super().__init__()
        # From coarse to fine: each block ends with the width of what it skips to, the last with that of the level before it.
        skips = (*reversed(widths[:-1]), channels)
        outputs = (*reversed(widths[:-1]), widths[0])
        inputs = (widths[-1], *outputs[:-1])
        self.blocks = nn.ModuleList(
            DecoderBlock(coarse, skip, out, options) for coarse, skip, out in zip(inputs, skips, outputs, strict=True)
        )

    def forward(self, image: Tensor, features: Sequence[Tensor], draws: Draws) -> Tensor:
        """Maps (S, B, widths[0], *space) of the image (B, C, *space) and the encoder's features, finest first."""
        hidden = features[-1].unsqueeze(0)
        for block, skip in zip(self.blocks, (*reversed(features[:-1]), image), strict=True):
            hidden = block(hidden, skip, draws)
        return hidden

    def checkpointed_blocks(self) -> nn.ModuleList:
        """See HasBlocks."""
        return self.blocks


def plain_conv(dimensions: Dimensions, inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool = False) -> nn.Module:
    """A deterministic convolution, padded so that only the stride changes the sides."""
    kind = nn.Conv2d if dimensions == 2 else nn.Conv3d
    return kind(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=bias)
