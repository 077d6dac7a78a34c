"""A raw modality as tokens that carry their position: pixels or patches, steps, one row (HEALNet; spec 4.5).

The paper's: channels last, flattened, a Fourier code of every axis beside the values, a table as one token of all its values. Ours:
observed bits beside the values, steps past the length masked, patches where an image has too many pixels.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.models.encoders.steps import counted_steps
from draf_dist.models.latent_attention import FourierCode, Tokens, TokenSpec
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.categories import as_numbers, num_numbers
from draf_dist.schema.modality import ImageSpec, ModalitySpec, SeriesSpec, TableSpec, VolumeSpec


class GridTokens(nn.Module):
    """(B, C, H, W) or (B, C, D, H, W) to one token per patch of side `patch`; pixels themselves where it is 1.

    A patch becomes `patch_width` values by a convolution of its own size and stride (spec 4.5: 96^3 voxels would be 884,736 tokens,
    in patches of 8^3 they are 1,728). Sides that the patch does not divide are continued with zeros.
    """

    def __init__(self, spec: ImageSpec | VolumeSpec, *, patch: int, patch_width: int, code: FourierCode) -> None:
        super().__init__()
        self.sides = (spec.height, spec.width) if isinstance(spec, ImageSpec) else spec.delivered
        self.patch, self.code = patch, code
        convolution = nn.Conv2d if isinstance(spec, ImageSpec) else nn.Conv3d
        self.embedding = None if patch == 1 else convolution(spec.channels, patch_width, patch, stride=patch)
        self.grid = tuple(math.ceil(side / patch) for side in self.sides)
        channels = spec.channels if patch == 1 else patch_width
        self.spec = TokenSpec(code.width(channels, len(self.grid)), math.prod(self.grid))

    def forward(self, image: Tensor) -> Tokens:
        """Tokens of one modality."""
        if self.embedding is not None:
            missing = [(-side) % self.patch for side in self.sides]
            # `pad` counts from the last axis, before and after each.
            image = self.embedding(functional.pad(image, [amount for side in reversed(missing) for amount in (0, side)]))
        return Tokens(self.code.beside(image.flatten(2).transpose(1, 2), self.grid))


class RowTokens(nn.Module):
    """SeriesInput (B, T, F) to one token of 2 F values and observed bits per step; a table is one step.

    A categorical variable counts as many times in F as it has categories: each has its indicator.
    """

    def __init__(self, spec: SeriesSpec | TableSpec, code: FourierCode) -> None:
        super().__init__()
        self.code = code
        self.modality = spec
        steps = spec.num_steps if isinstance(spec, SeriesSpec) else 1
        self.spec = TokenSpec(code.width(2 * num_numbers(spec), 1), steps)

    def forward(self, series: SeriesInput) -> Tokens:
        """Tokens of one modality."""
        numbers = as_numbers(self.modality, series)
        assert isinstance(numbers, SeriesInput)
        values = torch.cat([numbers.values, numbers.observed.to(numbers.values.dtype)], dim=-1)
        coded = self.code.beside(values, values.shape[1:2])
        # A table has its one row, whatever of it was observed.
        return Tokens(coded, counted_steps(series) if self.spec.number != 1 else None)


def smallest_patch(sides: tuple[int, ...], max_tokens: int) -> int:
    """The smallest side of a patch of which a grid needs no more than max_tokens."""
    patch = 1
    while math.prod(math.ceil(side / patch) for side in sides) > max_tokens:
        patch += 1
    return patch


def tokens_of(spec: ModalitySpec, *, max_tokens: int, patch_width: int, code: FourierCode) -> GridTokens | RowTokens:
    """What turns one modality into tokens."""
    if isinstance(spec, SeriesSpec | TableSpec):
        return RowTokens(spec, code)
    sides = (spec.height, spec.width) if isinstance(spec, ImageSpec) else spec.delivered
    patch = smallest_patch(sides, max_tokens)
    return GridTokens(spec, patch=patch, patch_width=patch_width, code=code)
