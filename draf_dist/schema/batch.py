"""What flows from the loader through a model: Batch in, FusionOutput out.

Axis letters, here and everywhere: B studies, M modalities, C channels, H W pixels, T time steps, F variables, K classes,
S posterior samples, Z features.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SeriesInput:
    """Values on a time grid (a table is a series of one step).

    values: f32 (B, T, F), anything where not observed. observed: bool (B, T, F). length: int64 (B,), steps that count, from the
    first; 0 where the modality is absent.
    """

    values: Tensor
    observed: Tensor
    length: Tensor


@dataclass(frozen=True)
class ClassTarget:
    """label: int64 (B,) in [0, K); observed: bool (B,), False where the label is unknown (then label is 0)."""

    label: Tensor
    observed: Tensor


ModalityInput = Tensor | SeriesInput


@dataclass(frozen=True)
class Batch:
    """B studies; see DESIGN for the fields. Images are (B, C, H, W): uint8 from the loader, f32 once normalised.

    Volumes are (B, C, D, H, W): int16 or float16 from the loader, f32 once normalised.
    present, corrupted: bool (B, M). severity, quality: f32 (B, M) in [0, 1]; quality_known: bool (B, M). site, uid, epoch: int64
    (B,); uid is -1 and weight 0 for padding rows. weight: f32 (B,). modalities names the axis M.
    """

    modalities: tuple[str, ...]
    inputs: dict[str, ModalityInput]
    present: Tensor
    corrupted: Tensor
    severity: Tensor
    quality: Tensor
    quality_known: Tensor
    target: ClassTarget
    site: Tensor
    uid: Tensor
    epoch: Tensor
    weight: Tensor

    @property
    def num_rows(self) -> int:
        """B, padding rows included."""
        return int(self.uid.shape[0])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor replaced by function(tensor)."""
        changed: dict[str, Any] = {f.name: _map(getattr(self, f.name), function) for f in fields(self) if f.name != "modalities"}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> "Batch":
        """Rows [start, stop)."""
        return self.map(lambda tensor: tensor[start:stop])


def _map(value: object, function: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _map(item, function) for name, item in value.items()}
    if isinstance(value, SeriesInput):
        return SeriesInput(function(value.values), function(value.observed), function(value.length))
    if isinstance(value, ClassTarget):
        return ClassTarget(function(value.label), function(value.observed))
    raise TypeError(f"a batch holds tensors, found {type(value).__name__}")


@dataclass(frozen=True)
class Term:
    """One named part of a loss as (numerator, weight), both f32 scalars over the local rows.

    The loss is numerator / weight with both summed over all ranks, times scale.
    """

    numerator: Tensor
    weight: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class FusionOutput:
    """What every fusion model returns.

    logits: f32 (S, B, K). reliability: f32 (B, M), sums to 1 over present, exactly 0 where absent. uncertainty: name -> f32 (B, M).
    corruption_logits: f32 (B, M), or None for a model without a corruption head. features: f32 (B, M, Z), 0 where absent.
    modality_logits: f32 (S, B, M, K), or None for a model without unimodal heads. terms: extra losses by name.
    """

    logits: Tensor
    reliability: Tensor
    uncertainty: dict[str, Tensor]
    features: Tensor
    corruption_logits: Tensor | None = None
    modality_logits: Tensor | None = None
    terms: dict[str, Term] = field(default_factory=dict)
