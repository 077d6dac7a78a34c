"""DRIFA-Net: dual robust information fusion attention (arXiv 2412.01248, WACV 2025; its public two-branch notebook; spec 4.4).

The paper's: the residual branches with attention in them (RRA), the attention within a modality (MFA) and across modalities
(MIFA), where they stand, dropout that is always on, batch normalisation, the starting parameters (Glorot, biases 0) and padding
("same", as Keras has it). Ours: any number of branches, absent ones, volumes, and series and tables, which enter as maps of one
pixel; one head for the task at hand; normalisation of one row alone instead (`norm: group`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.models.absent import clear_absent, mask_absent
from draf_dist.models.backbones import module_name
from draf_dist.models.encoders import EncoderConfig
from draf_dist.models.encoders.series import SeriesTransformerConfig
from draf_dist.models.encoders.tabular import TabularConfig
from draf_dist.models.layers import PresenceBits
from draf_dist.models.mc import MCDropout, name_streams, per_pass
from draf_dist.models.norm import BatchNorm, RowNorm
from draf_dist.models.reliability import equal_weights
from draf_dist.schema.batch import Batch, FusionOutput, ModalityInput
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, VolumeSpec

NormName = Literal["batch", "group"]
# Of the notebook: Keras' momentum .99, and an eps that is not torch's.
_MOMENTUM, _EPS = 0.01, 1e-3
_CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class DrifaConfig(Spec):
    """The published sizes are the defaults; tests and small data want narrower ones.

    widths: channels of each stage of two blocks; the first block of every stage but the first halves the resolution. norm: `batch`
    is the paper's, and in training a row then depends on the others of its global batch; `group` keeps rows apart. dropout: after
    every block but the last two, and before the head, on in evaluation too. series, table: what turns these into a vector.
    """

    kind: Literal["drifa"] = "drifa"
    widths: tuple[int, ...] = Field((64, 128, 256, 512), min_length=2)
    norm: NormName = "batch"
    dropout: float = Field(0.25, gt=0, lt=1)
    series: EncoderConfig = SeriesTransformerConfig()
    table: EncoderConfig = TabularConfig()
    presence_bits: bool = False

    def build(self, schema: DataSchema) -> "Drifa":
        """The model for one data schema.

        Raises:
            SpecError: an encoder does not fit its modality.
        """
        model = Drifa(self, schema)
        name_streams(model)
        return model


@dataclass(frozen=True)
class MapShape:
    """How the maps of one branch are convolved: in how many dimensions, with which kernel, and by how much blocks shrink them."""

    dims: Literal[2, 3]
    kernel: int = 3
    stride: int = 2

    @classmethod
    def of(cls, spec: ModalitySpec) -> "MapShape":
        """A series or table is a map of one pixel: of a larger kernel only the centre would ever meet anything but padding."""
        if isinstance(spec, ImageSpec | VolumeSpec):
            return cls(dims=2 if isinstance(spec, ImageSpec) else 3)
        return cls(dims=2, kernel=1, stride=1)

    def convolution(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d | nn.Conv3d:
        """One without padding: `same` pads."""
        return _CONVOLUTIONS[self.dims](inputs, outputs, kernel, stride=stride)


class Mfa(nn.Module):
    """Multi-branch fusion attention: a gain in (0, gamma) for every channel of a map, 8 C^2 + 9 C + 1 parameters.

    With s the logistic function, c_i and l_i convolutions of one pixel, avg and max over all pixels:
        A1 = s(c1 x)   A2 = s(c2 A1)   A3 = s(c3 (A1 + A2))   A4 = s(c4 A3)
        G = s(Dense[avg A1 + max A2, avg A3 + max A4])   L = avg s(l1 x) + s(l2 avg s(l1 x))   y = x s(g G + q L) gamma
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.chain = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(4))
        self.dense = nn.Linear(2 * channels, channels)
        self.local1 = nn.Conv1d(channels, channels, 1)
        self.local2 = nn.Linear(channels, channels)
        self.general_gain = nn.Parameter(torch.ones(1))
        self.local_gain = nn.Parameter(torch.ones(channels))
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, ...) of any number of dimensions to the same shape."""
        return _scaled(maps, self.attention(maps.flatten(2)) * self.gain)

    def attention(self, flat: Tensor) -> Tensor:
        """S(g G + q L), (N, C) in (0, 1), of maps (N, C, P)."""
        c1, c2, c3, c4 = self.chain
        first = c1(flat).sigmoid()
        second = c2(first).sigmoid()
        third = c3(first + second).sigmoid()
        fourth = c4(third).sigmoid()
        pooled = torch.cat([first.mean(2) + second.amax(2), third.mean(2) + fourth.amax(2)], dim=1)
        local = self.local1(flat).sigmoid().mean(2)
        local = local + self.local2(local).sigmoid()
        attention: Tensor = (self.general_gain * self.dense(pooled).sigmoid() + self.local_gain * local).sigmoid()
        return attention


class Mifa(nn.Module):
    """Multimodal information fusion attention: one attention over channels for all branches, 3 C^2 + 6 C + 1 parameters for two.

    F is one Dense with a logistic function, k_m a convolution of one pixel, pools are taken over all pixels:
        G = sum over pool in min, avg, max of F(sum_m pool x_m)   L = sum over pool of sum_m pool s(k_m x_m)
        y_m = x_m s(g G + q L) gamma_m
    Sums over m are over present branches, times M / number present: with all present they are the paper's.
    """

    def __init__(self, channels: int, num_branches: int) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, channels)
        self.local = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(num_branches))
        self.general_gain = nn.Parameter(torch.ones(1))
        self.local_gain = nn.Parameter(torch.ones(channels))
        self.gain = nn.Parameter(torch.ones(num_branches, channels))

    def forward(self, maps: Sequence[Tensor], present: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps (N, C, ...) of every branch and present (N, M) to maps of the same shapes and the attention (N, C)."""
        attention = self.attention([values.flatten(2) for values in maps], present)
        return [_scaled(values, attention * gain) for values, gain in zip(maps, self.gain, strict=True)], attention

    def attention(self, flat: Sequence[Tensor], present: Tensor) -> Tensor:
        """S(g G + q L), (N, C) in (0, 1), of maps (N, C, P_m)."""
        least, mean, most = _over_present([_pools(values) for values in flat], present)
        general = self.dense(least).sigmoid() + self.dense(mean).sigmoid() + self.dense(most).sigmoid()
        asked = [_pools(layer(values).sigmoid()) for layer, values in zip(self.local, flat, strict=True)]
        least, mean, most = _over_present(asked, present)
        attention: Tensor = (self.general_gain * general + self.local_gain * (least + mean + most)).sigmoid()
        return attention


class Rra(nn.Module):
    """Robust residual attention: conv - MFA - norm - ReLU - conv - MFA - norm, plus the input, then ReLU.

    The input goes through a convolution of one pixel and a norm where shapes differ.
    """

    def __init__(self, shape: MapShape, inputs: int, outputs: int, stride: int, norm: NormName) -> None:
        super().__init__()
        self.conv1 = shape.convolution(inputs, outputs, shape.kernel, stride)
        self.attention1, self.norm1 = Mfa(outputs), _norm(norm, outputs)
        self.conv2 = shape.convolution(outputs, outputs, shape.kernel)
        self.attention2, self.norm2 = Mfa(outputs), _norm(norm, outputs)
        same = inputs == outputs and stride == 1
        self.projection = None if same else shape.convolution(inputs, outputs, 1, stride)
        self.projection_norm = None if same else _norm(norm, outputs)

    def forward(self, maps: Tensor, weight: Tensor) -> Tensor:
        """Maps (N, inputs, ...) and weights (N,) of the rows to (N, outputs, ...)."""
        hidden = functional.relu(self.norm1(self.attention1(same(self.conv1, maps)), weight))
        hidden = self.norm2(self.attention2(same(self.conv2, hidden)), weight)
        if self.projection is None or self.projection_norm is None:
            return functional.relu(hidden + maps)
        return functional.relu(hidden + self.projection_norm(same(self.projection, maps), weight))


class Stem(nn.Module):
    """The start of an image's branch: convolution of 7 pixels, MFA, norm, ReLU, maximum over 3, at a quarter of the resolution."""

    def __init__(self, shape: MapShape, inputs: int, outputs: int, norm: NormName) -> None:
        super().__init__()
        self.conv = shape.convolution(inputs, outputs, 7, 2)
        self.attention, self.norm = Mfa(outputs), _norm(norm, outputs)
        self.pool = functional.max_pool2d if shape.dims == 2 else functional.max_pool3d

    def forward(self, image: Tensor, weight: Tensor) -> Tensor:
        """Images (B, inputs, ...) and weights (B,) to maps (B, outputs, ...)."""
        hidden = functional.relu(self.norm(self.attention(same(self.conv, image)), weight))
        pooled: Tensor = self.pool(pad_same(hidden, 3, 2, -torch.inf), 3, 2)
        return pooled


class BranchBlock(nn.Module):
    """RRA, then dropout and MFA, or MFA alone, or neither."""

    def __init__(self, rra: Rra, dropout: MCDropout | None, attention: Mfa | None) -> None:
        super().__init__()
        self.rra, self.dropout, self.attention = rra, dropout, attention

    def forward(self, maps: Tensor, keys: Tensor, weight: Tensor) -> Tensor:
        """Maps (S or 1, B, inputs, ...), keys (S, B) and weights (B,) to maps (S or 1, B, outputs, ...)."""
        repeated = weight.repeat(maps.shape[0])
        hidden = per_pass(lambda flat: self.rra(flat, repeated), maps)
        hidden = hidden if self.dropout is None else self.dropout(hidden, keys)
        return hidden if self.attention is None else per_pass(self.attention, hidden)


class FusedBlock(nn.Module):
    """One block of every branch, and MIFA between them."""

    def __init__(self, branches: Sequence[BranchBlock], mifa: Mifa) -> None:
        super().__init__()
        self.branches, self.mifa = nn.ModuleList(branches), mifa

    def forward(self, maps: Sequence[Tensor], keys: Tensor, present: Tensor, weight: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps (S or 1, B, C, ...) of every branch, present and weights (B, M) to maps (S, B, ...) and the attention (S, B, C)."""
        each = zip(self.branches, maps, weight.unbind(1), strict=True)
        blocked = [branch(values, keys, rows) for branch, values, rows in each]
        passes, rows = blocked[0].shape[:2]
        fused, attention = self.mifa([values.flatten(0, 1) for values in blocked], present.repeat(passes, 1))
        return [values.unflatten(0, (passes, rows)) for values in fused], attention.unflatten(0, (passes, rows))


class DrifaTrunk(nn.Module):
    """The branches and what goes on between them, up to the maps that the heads pool."""

    def __init__(self, config: DrifaConfig, modalities: Sequence[ModalitySpec]) -> None:
        super().__init__()
        shapes = [MapShape.of(spec) for spec in modalities]
        first = config.widths[0]
        self.stems = nn.ModuleDict(
            {
                module_name(spec.name): Stem(shape, spec.channels, first, config.norm)
                for spec, shape in zip(modalities, shapes, strict=True)
                if isinstance(spec, ImageSpec | VolumeSpec)
            }
        )
        outputs = [width for width in config.widths for _ in range(2)]
        inputs = [first, *outputs[:-1]]
        self.blocks = nn.ModuleList(
            FusedBlock([_branch_block(config, shape, inputs, outputs, index) for shape in shapes], Mifa(width, len(shapes)))
            for index, width in enumerate(outputs)
        )
        self.apply(start_as_keras)
        self.encoders = nn.ModuleDict(
            {
                module_name(spec.name): (config.series if isinstance(spec, SeriesSpec) else config.table).build(spec, first)
                for spec in modalities
                if not isinstance(spec, ImageSpec | VolumeSpec)
            }
        )
        self.names = tuple(spec.name for spec in modalities)

    def forward(self, batch: Batch, keys: Tensor) -> tuple[list[Tensor], Tensor]:
        """The maps (S, B, C, ...) of every branch after the last block; MIFA's attention, mean over C, as (blocks, S, B)."""
        inputs = clear_absent(batch)
        weight = batch.weight.unsqueeze(1) * batch.present
        maps = [self.begin(name, inputs[name], keys, rows) for name, rows in zip(self.names, weight.unbind(1), strict=True)]
        seen = []
        for block in self.blocks:
            maps, attention = block(maps, keys, batch.present, weight)
            seen.append(attention.mean(-1))
        return maps, torch.stack(seen)

    def begin(self, name: str, value: ModalityInput, keys: Tensor, weight: Tensor) -> Tensor:
        """The first maps (S or 1, B, C, ...) of a branch."""
        if isinstance(value, Tensor):
            maps: Tensor = self.stems[module_name(name)](value, weight)
            return maps.unsqueeze(0)
        vector: Tensor = self.encoders[module_name(name)](value, keys)
        return vector[..., None, None]


class Drifa(nn.Module):
    """One Linear of [pooled maps of every branch].

    Parameters beside the trunk: M C K + K of the head. Two images and heads for 5 and 7 classes make the published 53,865,668
    trained parameters and 19,200 running statistics.
    """

    def __init__(self, config: DrifaConfig, schema: DataSchema) -> None:
        super().__init__()
        self.config = config
        num_modalities = len(schema.modalities)
        self.trunk = DrifaTrunk(config, schema.modalities)
        self.dropouts = nn.ModuleList(MCDropout(config.dropout) for _ in schema.modalities)
        self.head = nn.Linear(num_modalities * config.widths[-1], schema.num_outputs)
        start_as_keras(self.head)
        self.bits = PresenceBits(num_modalities, schema.num_outputs) if config.presence_bits else None

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """Logits of S passes of a normalised batch; keys int64 (S, B). It has no weights of modalities: `reliability` says 1 / n.

        signals: mifa_attention, mean over passes, blocks and channels; 1 lets everything through. The published net begins at .98
        or more, where the slope of the sigmoid is .02 at most, so that it hardly attends (spec 4.4 f).
        """
        present = batch.present
        maps, attention = self.trunk(batch, keys)
        # Dropout of the maps side by side is that of each: maps of images and of volumes cannot stand side by side.
        pooled = [dropout(values, keys).flatten(3).mean(3) for dropout, values in zip(self.dropouts, maps, strict=True)]
        features = mask_absent(torch.stack(pooled, dim=2), present)
        logits: Tensor = self.head(features.flatten(2))
        return FusionOutput(
            logits=logits if self.bits is None else logits + self.bits(present),
            reliability=equal_weights(present),
            uncertainty={},
            features=features.mean(0),
            signals={"mifa_attention": attention.detach().mean((0, 1))},
        )

    def checkpointed_blocks(self) -> list[Rra]:
        """See HasBlocks: none with running statistics."""
        return [part for part in self.modules() if isinstance(part, Rra)] if self.config.norm == "group" else []


def same(layer: nn.Conv2d | nn.Conv3d, maps: Tensor) -> Tensor:
    """A convolution whose output has ceil(size / stride) elements along each axis, padded as Keras does."""
    result: Tensor = layer(pad_same(maps, layer.kernel_size[0], layer.stride[0], 0.0))
    return result


def pad_same(maps: Tensor, kernel: int, stride: int, value: float) -> Tensor:
    """Maps (N, C, ...) padded so that ceil(size / stride) windows fit; an odd element of padding comes last."""
    sides: list[int] = []
    for size in reversed(maps.shape[2:]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return functional.pad(maps, sides, value=value) if any(sides) else maps


def _branch_block(config: DrifaConfig, shape: MapShape, inputs: Sequence[int], outputs: Sequence[int], index: int) -> BranchBlock:
    stride = shape.stride if index > 0 and index % 2 == 0 else 1
    rra = Rra(shape, inputs[index], outputs[index], stride, config.norm)
    left = len(outputs) - 1 - index
    return BranchBlock(rra, MCDropout(config.dropout) if left > 1 else None, Mfa(outputs[index]) if left > 0 else None)


def _norm(name: NormName, channels: int) -> nn.Module:
    return BatchNorm(channels, momentum=_MOMENTUM, eps=_EPS) if name == "batch" else RowNorm(channels, eps=_EPS)


def _scaled(maps: Tensor, gain: Tensor) -> Tensor:
    return maps * gain.view(*gain.shape, *[1] * (maps.dim() - 2))


def _pools(flat: Tensor) -> Tensor:
    """Minimum, mean and maximum over P of (N, C, P): (3, N, C)."""
    return torch.stack([flat.amin(2), flat.mean(2), flat.amax(2)])


def _over_present(pools: Sequence[Tensor], present: Tensor) -> Tensor:
    """The sum over present branches of (3, N, C) each, times M / number present."""
    scale = len(pools) / present.sum(1).clamp_min(1)
    kept = torch.where(present.T.unsqueeze(1).unsqueeze(-1), torch.stack(list(pools)), 0.0)
    return kept.sum(0) * scale.unsqueeze(1).to(kept.dtype)


def start_as_keras(module: nn.Module) -> None:
    """Glorot uniform, biases 0."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        nn.init.xavier_uniform_(module.weight)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
