"""The published encoders of DrFuse, each with one beginning and two ends: shared and distinct features (spec 4.6).

As the repository has them, with its repairs (ReLU and max-pooling in the stem, average pooling before the last layer). Ours:
GroupNorm for BatchNorm, which the zeros of absent images would shift (defect c); observed bits beside the values; dropout as MC
dropout, on what attention gives and not on its weights (rule D5).
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.models.encoders.steps import counted_steps, masked_mean
from draf_dist.models.mc import MCDropout, per_pass
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.modality import ImageSpec, ModalitySpec, SeriesSpec

_EXPANSION = 4


class TrunksConfig(Spec):
    """heads, feed_forward, dropout: of the transformer of series. blocks, channels: of the ResNet of images; (3, 4, 6, 3) is 50."""

    heads: int = Field(4, ge=1)
    feed_forward: int = Field(2048, ge=1)
    dropout: float = Field(0.3, ge=0, lt=1)
    blocks: tuple[int, ...] = Field((3, 4, 6, 3), min_length=1)
    channels: int = Field(64, ge=1)

    def build(self, spec: ModalitySpec, width: int) -> "SeriesTrunk | ImageTrunk":
        """The trunk of one modality.

        Raises:
            SpecError: the paper has none for modalities of this kind, or the heads don't divide the width.
        """
        if isinstance(spec, ImageSpec):
            return ImageTrunk(self, spec, width)
        if isinstance(spec, SeriesSpec):
            return SeriesTrunk(self, spec, width)
        remedy = "Leave model.trunks out: then every kind is read by its encoder, twice."
        raise SpecError(
            explain(f"model.trunks: {spec.name}", expected="a modality of kind image or series", found=spec.kind, remedy=remedy)
        )


class SeriesTrunk(nn.Module):
    """SeriesInput (B, T, F) to shared and distinct features: Linear, learned positions, one layer, then a layer for either."""

    def __init__(self, config: TrunksConfig, spec: SeriesSpec, width: int) -> None:
        super().__init__()
        if width % config.heads:
            remedy = "Choose a width that the heads divide."
            raise SpecError(
                explain("model.trunks.heads", expected=f"a divisor of width {width}", found=str(config.heads), remedy=remedy)
            )
        self.embedding = nn.Linear(2 * len(spec.variables), width)
        self.positions = nn.Parameter(torch.empty(spec.num_steps, width).uniform_(-0.1, 0.1))
        self.common, self.shared, self.distinct = (PostNormLayer(config, width) for _ in range(3))

    def forward(self, series: SeriesInput, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Shared and distinct features, (S, B, width) each: means over the steps that count."""
        values = torch.cat([series.values, series.observed.to(series.values.dtype)], dim=-1)
        counts = counted_steps(series)
        # A row without a step attends to its zeros: a softmax over nothing is NaN in some kernels.
        attended = counts | ~counts.any(1, keepdim=True)
        hidden = self.common((self.embedding(values) + self.positions).unsqueeze(0), attended, keys)
        shared, distinct = (masked_mean(end(hidden, attended, keys), counts) for end in (self.shared, self.distinct))
        return _every_pass(shared, keys), _every_pass(distinct, keys)

    def checkpointed_blocks(self) -> tuple[nn.Module, ...]:
        """See HasBlocks."""
        return (self.common, self.shared, self.distinct)


class PostNormLayer(nn.Module):
    """LN(x + drop(attention x)), then LN(x + drop(Linear drop relu Linear x)), as Vaswani et al. 2017."""

    def __init__(self, config: TrunksConfig, width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.expand = nn.Linear(width, config.feed_forward)
        self.contract = nn.Linear(config.feed_forward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout1, self.dropout2, self.dropout3 = (MCDropout(config.dropout) for _ in range(3))

    def forward(self, hidden: Tensor, attended: Tensor, keys: Tensor) -> Tensor:
        """Tokens (S or 1, B, T, width); attended bool (B, T)."""
        mask = attended[:, None, None, :].repeat(hidden.shape[0], 1, 1, 1)
        hidden = self.norm1(hidden + self.dropout1(per_pass(lambda flat: self.attend(flat, mask), hidden), keys))
        wide = self.dropout2(functional.relu(self.expand(hidden)), keys)
        result: Tensor = self.norm2(hidden + self.dropout3(self.contract(wide), keys))
        return result

    def attend(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Self-attention of (N, T, width) under a bool mask (N, 1, 1, T)."""
        rows, steps, width = tokens.shape
        parts = self.queries_keys_values(tokens).view(rows, steps, 3, self.heads, width // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=0.0)
        result: Tensor = self.output(mixed.transpose(1, 2).reshape(rows, steps, width))
        return result


class ImageTrunk(nn.Module):
    """(B, C, H, W) to shared and distinct features: the stem of a ResNet, then its stages and a last layer for either."""

    def __init__(self, config: TrunksConfig, spec: ImageSpec, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(spec.channels, config.channels, 7, stride=2, padding=3, bias=False)
        self.norm = _norm(config.channels)
        self.shared, self.distinct = (_stages(config) for _ in range(2))
        last = config.channels * 2 ** (len(config.blocks) - 1) * _EXPANSION
        self.shared_output, self.distinct_output = (nn.Linear(last, width) for _ in range(2))

    def forward(self, image: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Shared and distinct features, (S, B, width) each, the same in every pass."""
        hidden = functional.max_pool2d(functional.relu(self.norm(self.stem(image))), 3, stride=2, padding=1)
        shared = self.shared_output(self.shared(hidden).mean((-2, -1)))
        distinct = self.distinct_output(self.distinct(hidden).mean((-2, -1)))
        return _every_pass(shared.unsqueeze(0), keys), _every_pass(distinct.unsqueeze(0), keys)

    def checkpointed_blocks(self) -> list[nn.Module]:
        """See HasBlocks."""
        return [*self.shared, *self.distinct]


class Bottleneck(nn.Module):
    """1x1 - 3x3 - 1x1 convolutions with norms, plus the input (through a 1x1 convolution where shapes differ): He et al. 2015."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * channels
        self.conv1, self.norm1 = nn.Conv2d(inputs, channels, 1, bias=False), _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = _norm(channels)
        self.conv3, self.norm3 = nn.Conv2d(channels, outputs, 1, bias=False), _norm(outputs)
        same = inputs == outputs and stride == 1
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), _norm(outputs))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, values: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, 4 channels, H / stride, W / stride)."""
        hidden = functional.relu(self.norm1(self.conv1(values)))
        hidden = functional.relu(self.norm2(self.conv2(hidden)))
        return functional.relu(self.norm3(self.conv3(hidden)) + self.shortcut(values))


def _norm(channels: int) -> nn.GroupNorm:
    """In 32 groups where they divide the channels (Wu and He 2018), else in as many as divide both."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _stages(config: TrunksConfig) -> nn.Sequential:
    """All stages; from the second on each begins at half the resolution with twice the channels."""
    blocks: list[Bottleneck] = []
    inputs = config.channels
    for stage, number in enumerate(config.blocks):
        channels = config.channels * 2**stage
        for index in range(number):
            blocks.append(Bottleneck(inputs, channels, stride=2 if stage and not index else 1))
            inputs = _EXPANSION * channels
    return nn.Sequential(*blocks)


def _every_pass(features: Tensor, keys: Tensor) -> Tensor:
    return features.expand(keys.shape[0], -1, -1)
