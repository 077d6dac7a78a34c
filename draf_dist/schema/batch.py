"""What flows from the loader through a model: Batch in, FusionOutput out.

Axis letters, here and everywhere: B studies, M modalities, C channels, H W pixels, T time steps, F variables, K classes,
S posterior samples, Z features.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

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


@dataclass(frozen=True)
class MultiLabelTarget:
    """label, observed: bool (B, K); where a label was not observed it is False."""

    label: Tensor
    observed: Tensor


@dataclass(frozen=True)
class SurvivalTarget:
    """When something happened, or until when it had not.

    time: f32 (B,), of the event or of the last time seen. event: bool (B,), False where censored. interval: int64 (B,) in
    [0, K), in which the time lies. observed: bool (B,), False where nothing is known (then all else is 0).
    """

    time: Tensor
    event: Tensor
    interval: Tensor
    observed: Tensor


@dataclass(frozen=True)
class SegmentationTarget:
    """mask: int64 (B, D, H, W) or (B, H, W) in [0, K), or IGNORED (-1), of the part of the image that was delivered.

    observed: bool (B,), False where there is no mask (then it is 0).
    """

    mask: Tensor
    observed: Tensor


Target = ClassTarget | MultiLabelTarget | SurvivalTarget | SegmentationTarget
ModalityInput = Tensor | SeriesInput
_Tensors = TypeVar("_Tensors", bound=SeriesInput | Target)


def hide(target: Target, kept: Tensor) -> Target:
    """The target with nothing observed, and 0 throughout, in the rows that are not kept, bool (B,)."""

    def cleared(values: Tensor) -> Tensor:
        return torch.where(kept.view(-1, *[1] * (values.dim() - 1)), values, torch.zeros_like(values))

    return _each(target, cleared)


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
    target: Target
    site: Tensor
    uid: Tensor
    epoch: Tensor
    weight: Tensor

    @property
    def classes(self) -> ClassTarget:
        """The target, for what is there for class labels alone.

        Raises:
            TypeError: the target is another one; what reads a release asks DataSchema.classes first, which says it to the user.
        """
        if not isinstance(self.target, ClassTarget):
            raise TypeError(f"expected a ClassTarget, found {type(self.target).__name__}")
        return self.target

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
    if isinstance(value, SeriesInput | Target):
        return _each(value, function)
    raise TypeError(f"a batch holds tensors, found {type(value).__name__}")


def _each(value: _Tensors, function: Callable[[Tensor], Tensor]) -> _Tensors:
    changed: dict[str, Any] = {part.name: function(getattr(value, part.name)) for part in fields(value)}
    return replace(value, **changed)


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
    modality_logits: f32 (S, B, M, K), or None for a model without unimodal heads. terms: extra losses by name. parts: name ->
    (B, ...), what an objective of the model's own looks at. signals: name -> f32 (B,) without gradient, how the model's mechanism
    is doing; their means are logged.
    """

    logits: Tensor
    reliability: Tensor
    uncertainty: dict[str, Tensor]
    features: Tensor
    corruption_logits: Tensor | None = None
    modality_logits: Tensor | None = None
    terms: dict[str, Term] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    signals: dict[str, Tensor] = field(default_factory=dict)
