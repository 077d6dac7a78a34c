"""Early fusion: raw inputs side by side into one MLP (DRAF proposal, baselines; spec 4.1).

From the proposal: concatenated raw features, one deterministic net. From the spec: images pooled to a fixed size, series padded,
the presence bits, 512-256-K, dropout in training only. Ours: inputs smaller than the pooled size stay as they are, observed bits
as an option.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.models.absent import clear_absent
from draf_dist.models.layers import PresenceBits
from draf_dist.models.mc import MCDropout, name_streams
from draf_dist.models.reliability import equal_weights
from draf_dist.schema.batch import Batch, FusionOutput, ModalityInput, SeriesInput
from draf_dist.schema.categories import as_numbers, num_numbers
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, VolumeSpec


class EarlyConfig(Spec):
    """How large raw inputs are, and the MLP over them.

    image_side, volume_side: pixels of the longest side that a pooled image, or volume, may have. observed_bits: which values of
    series and tables were observed stands beside them; without it a value that was not is a 0. presence_bits: adds B0 P to the
    logits; the bits P themselves are always part of the input.
    """

    kind: Literal["early"] = "early"
    hidden: tuple[int, ...] = Field((512, 256), min_length=1)
    dropout: float = Field(0.3, ge=0, lt=1)
    image_side: int = Field(32, ge=1)
    volume_side: int = Field(16, ge=1)
    observed_bits: bool = False
    presence_bits: bool = False

    def build(self, schema: DataSchema) -> "EarlyFusion":
        """The model for one data schema."""
        model = EarlyFusion(self, schema)
        name_streams(model)
        return model


class EarlyFusion(nn.Module):
    """MLP of [pooled images, flattened series and tables, P]. Deterministic in evaluation: all passes are the same.

    It has no weights of its own; `reliability` says 1 / n over present. No features: nothing stands for one modality alone.
    """

    def __init__(self, config: EarlyConfig, schema: DataSchema) -> None:
        super().__init__()
        self.config = config
        self.modalities = schema.modalities
        num_modalities = len(schema.modalities)
        widths = (sum(math.prod(shape_of(spec, config)) for spec in schema.modalities) + num_modalities, *config.hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.dropouts = nn.ModuleList(MCDropout(config.dropout) for _ in config.hidden)
        self.output = nn.Linear(widths[-1], schema.num_outputs)
        self.bits = PresenceBits(num_modalities, schema.num_outputs) if config.presence_bits else None

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """Logits of S passes of a normalised batch; keys int64 (S, B). No uncertainties: no modality predicts alone."""
        present = batch.present
        hidden = self.raw(batch).unsqueeze(0)
        for layer, dropout in zip(self.layers, self.dropouts, strict=True):
            hidden = functional.relu(layer(hidden))
            # Against rule D5 on purpose: the proposal's early fusion is a deterministic net.
            hidden = dropout(hidden, keys) if self.training else hidden
        logits: Tensor = self.output(hidden)
        return FusionOutput(
            logits=(logits if self.bits is None else logits + self.bits(present)).expand(keys.shape[0], -1, -1),
            reliability=equal_weights(present),
            uncertainty={},
            features=logits.new_zeros(*present.shape, 0),
        )

    def raw(self, batch: Batch) -> Tensor:
        """One row of numbers per study, f32 (B, inputs of the MLP): 0 wherever nothing was measured, the presence bits last."""
        inputs = clear_absent(batch)
        flat = [self._flat(spec, inputs[spec.name]) for spec in self.modalities]
        return torch.cat([*flat, batch.present.to(flat[0].dtype)], dim=1)

    def _flat(self, spec: ModalitySpec, value: ModalityInput) -> Tensor:
        if isinstance(value, Tensor):
            sides = list(shape_of(spec, self.config)[1:])
            pool = functional.adaptive_avg_pool3d if len(sides) == 3 else functional.adaptive_avg_pool2d
            pooled: Tensor = pool(value, sides)  # type: ignore[arg-type]
            return pooled.flatten(1)
        value = as_numbers(spec, value)
        assert isinstance(value, SeriesInput)
        if not self.config.observed_bits:
            return value.values.flatten(1)
        return torch.cat([value.values, value.observed.to(value.values.dtype)], dim=-1).flatten(1)


def shape_of(spec: ModalitySpec, config: EarlyConfig) -> tuple[int, ...]:
    """The shape in which a modality enters: (C, H, W) or (C, D, H, W) after pooling, (T, F) of a series, (1, F) of a table."""
    if isinstance(spec, ImageSpec):
        return (spec.channels, *(min(side, config.image_side) for side in (spec.height, spec.width)))
    if isinstance(spec, VolumeSpec):
        return (spec.channels, *(min(side, config.volume_side) for side in spec.delivered))
    steps = spec.num_steps if isinstance(spec, SeriesSpec) else 1
    return (steps, num_numbers(spec) * (2 if config.observed_bits else 1))
