"""Modalities that go missing: completely at random (MCAR), by training's modality dropout, or more often in the sicker (MNAR).

Invariant I2 holds for all of them: a sample that has a modality keeps at least one. Padding rows are left alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.errors import DataError, explain
from draf_dist.schema.batch import Batch, ClassTarget, MultiLabelTarget, SeriesInput, SurvivalTarget

_BISECTIONS = 60
# |a + b s| beyond this is certainty in float64.
_LOGIT_BOUND = 1e3


def drop_at_random(
    batch: Batch,
    probability: float,
    *,
    seed: int,
    epoch: Tensor | None,
    modality: str | None = None,
    inputs: frozenset[str] | None = None,
) -> Batch:
    """Every modality present goes missing with this probability; with `modality`, only that one can.

    epoch is the key's: the batch's in training, None in evaluation. inputs: what can go missing at all, and of which a sample keeps
    one; None: every modality.
    """
    columns = [modality is None or name == modality for name in batch.modalities]
    chance = torch.tensor([probability if column else 0.0 for column in columns], device=batch.present.device)
    counted = torch.tensor([inputs is None or name in inputs for name in batch.modalities], device=batch.present.device)
    return _drop(batch, chance.expand_as(batch.present), seed=seed, epoch=epoch, present=batch.present & counted)


@dataclass(frozen=True)
class NotAtRandom:
    """logit P(modality m is missing) = offsets[m] + slope * s_i, with s_i the standardised severity of the sample (spec 0.4).

    s_i is the label, or the first principal score of the EHR: direction (F,) over what `_record_vector` gives, centred.
    mean and std standardise it; all float64.
    """

    offsets: Tensor
    slope: float
    direction: Tensor | None
    mean: float
    std: float

    def apply(self, batch: Batch, *, seed: int) -> Batch:
        """The batch with modalities missing, keyed by uid."""
        return _drop(batch, self.probability(batch), seed=seed, epoch=None, present=batch.present)

    def probability(self, batch: Batch) -> Tensor:
        """P(missing) before one is kept, f64 (B, M)."""
        score = (_raw_score(batch, self.direction) - self.mean) / self.std
        return torch.sigmoid(self.offsets.to(score.device) + self.slope * score[:, None])


def fit_not_at_random(
    batches: Iterable[Batch], *, rate: float, slope: float, score: Literal["label", "ehr"] = "label"
) -> NotAtRandom:
    """Finds the offsets for which each modality goes missing at `rate` among the samples that have it.

    batches: a whole split, normalised; its records are held in memory (N x F). The marginal is that of the draw, before one
    modality is kept.

    Raises:
        DataError: the severity is the same for all samples, so nothing can depend on it.
    """
    batches = [records_only(batch) for batch in batches]
    direction = _principal_direction(batches) if score == "ehr" else None
    raw = torch.cat([_raw_score(batch, direction) for batch in batches])
    std = float(raw.std(correction=0))
    if not std > 0:
        raise constant_severity(score, raw.numel())
    mean = float(raw.mean())
    standard, present = (raw - mean) / std, torch.cat([batch.present for batch in batches])
    offsets = [find_offset(standard[present[:, column]], rate=rate, slope=slope) for column in range(present.shape[1])]
    return NotAtRandom(torch.tensor(offsets, dtype=torch.float64), slope, direction, mean, std)


def constant_severity(score: str, count: int) -> DataError:
    """The error for a severity that is the same for all samples."""
    found = f"one {score} for all {count} samples"
    return DataError(explain("missing not at random", expected="a severity that varies", found=found, remedy="Use another split."))


def records_only(batch: Batch) -> Batch:
    """The batch without images, which say nothing about severity here and would not fit in memory for a whole split."""
    return replace(batch, inputs={name: value for name, value in batch.inputs.items() if isinstance(value, SeriesInput)})


def find_offset(score: Tensor, *, rate: float, slope: float) -> float:
    """The a for which mean sigmoid(a + slope * score) is `rate`, by bisection; 0 for an empty score."""
    low, high = -_LOGIT_BOUND, _LOGIT_BOUND
    if score.numel() == 0:
        return 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(torch.sigmoid(middle + slope * score).mean()) < rate else (low, middle)
    return (low + high) / 2


def _drop(batch: Batch, probability: Tensor, *, seed: int, epoch: Tensor | None, present: Tensor) -> Batch:
    """present: bool (B, M), what is there and can go missing."""
    draws = torch.stack([_draw(batch, name, "lost", seed, epoch) for name in batch.modalities], dim=1)
    order = torch.stack([_draw(batch, name, "kept", seed, epoch) for name in batch.modalities], dim=1)
    lost = present & (draws < probability) & (batch.weight > 0)[:, None]
    bare = ~(present & ~lost).any(dim=1)
    # The one to keep is drawn apart: the largest of the first draws would favour modalities that go missing more often.
    kept = torch.where(present, order, -1.0).argmax(dim=1)
    saved = torch.zeros_like(lost).scatter(1, kept[:, None], True) & bare[:, None]
    return with_present(batch, batch.present & ~(lost & ~saved))


def with_present(batch: Batch, present: Tensor) -> Batch:
    """The batch with some modalities made absent: inputs 0, not observed, no flag of a corruption."""
    return replace(
        batch,
        present=present,
        corrupted=batch.corrupted & present,
        severity=torch.where(present, batch.severity, 0.0),
        inputs={name: _masked(batch.inputs[name], present[:, column]) for column, name in enumerate(batch.modalities)},
    )


def _masked(value: Tensor | SeriesInput, present: Tensor) -> Tensor | SeriesInput:
    if isinstance(value, SeriesInput):
        here = present[:, None, None]
        return SeriesInput(torch.where(here, value.values, 0.0), value.observed & here, torch.where(present, value.length, 0))
    return torch.where(present.view(-1, *[1] * (value.dim() - 1)), value, 0.0)


def _draw(batch: Batch, name: str, purpose: str, seed: int, epoch: Tensor | None) -> Tensor:
    keys = noise.sample_keys(seed, f"missing/{name}/{purpose}", epoch, batch.uid, 1)[0]
    return noise.uniform(keys, (1,))[:, 0]


def _record_vector(batch: Batch) -> Tensor:
    """All series and tables of a batch as f64 (B, F): the mean over the observed steps of each variable, 0 where there is none."""
    parts = []
    for value in batch.inputs.values():
        if isinstance(value, SeriesInput):
            count = value.observed.sum(dim=1)
            total = torch.where(value.observed, value.values, 0.0).double().sum(dim=1)
            parts.append(total / count.clamp(min=1))
    return torch.cat(parts, dim=1) if parts else torch.zeros(batch.num_rows, 1, dtype=torch.float64)


def label_score(batch: Batch) -> Tensor:
    """How sick a study counts as by its label, f64 (B,): class index; number of labels known to hold; whether the event was seen.

    Raises:
        TypeError: the target is a mask.
    """
    match batch.target:
        case ClassTarget(label, _):
            return label.double()
        case MultiLabelTarget(label, observed):
            return (label & observed).sum(1).double()
        case SurvivalTarget(_, event, _, _):
            return event.double()
        case _:
            raise TypeError(f"{type(batch.target).__name__} says nothing of how sick a study is")


def _raw_score(batch: Batch, direction: Tensor | None) -> Tensor:
    if direction is None:
        return label_score(batch)
    return _record_vector(batch) @ direction.to(batch.uid.device)


def _principal_direction(batches: list[Batch]) -> Tensor:
    """First principal axis of the records, (F,) of unit length; its sign is that which goes with the label."""
    records = torch.cat([_record_vector(batch) for batch in batches])
    label = torch.cat([label_score(batch) for batch in batches])
    centred = records - records.mean(dim=0)
    direction: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    return direction if float((centred @ direction) @ (label - label.mean())) >= 0 else -direction
