"""Whether the uncertainty of a modality is its risk by another name (findings 1): measured at every validation, told at the end."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draf_dist.metrics.rank import correlation_warning, risk_correlation
from draf_dist.schema.batch import Batch, ClassTarget, FusionOutput, MultiLabelTarget, SurvivalTarget, Target
from draf_dist.training.journal import Line

# Before a modality's name, in the numbers of a validation.
PREFIX = "risk_correlation/"
# What the weights use, where a model says so; else the proposal's own uncertainty.
_KINDS = ("used", "epistemic")


def risk_columns(output: FusionOutput, batch: Batch) -> tuple[Tensor, Tensor]:
    """U and risk of every modality, f64 (n, M) each, of the n rows that are no padding; not a number where there is none.

    The risk is that which the modality sees by itself, or the fused one where no head of its own says it.
    """
    nothing = torch.full_like(batch.severity, torch.nan, dtype=torch.float64)
    kind = next((kind for kind in _KINDS if kind in output.uncertainty), None)
    uncertainty = nothing if kind is None else output.uncertainty[kind].double()
    if output.modality_logits is None:
        risk = _risk(output.logits, batch.target)[:, None].expand_as(nothing)
    else:
        risk = _risk(output.modality_logits, batch.target)
    counted = batch.weight > 0
    uncertainty, risk = (torch.where(batch.present, values, nothing)[counted] for values in (uncertainty, risk))
    return uncertainty, risk


def risk_correlations(uncertainty: NDArray[np.float64], risk: NDArray[np.float64], modalities: Sequence[str]) -> dict[str, float]:
    """Spearman(U, risk) by modality, under the names of the numbers of a validation; not a number where it does not exist."""
    return {f"{PREFIX}{name}": risk_correlation(uncertainty[:, m], risk[:, m]) for m, name in enumerate(modalities)}


def risk_warnings(metrics: Iterable[Line], best_step: int | None) -> tuple[str, ...]:
    """What the validation at a step found that a reader should know; metrics: the lines of metrics.jsonl."""
    line = next((line for line in metrics if line["event"] == "epoch" and line["step"] == best_step), {})
    found = {name.removeprefix(PREFIX): value for name, value in line.items() if name.startswith(PREFIX)}
    texts = (correlation_warning(name, value) for name, value in found.items() if math.isfinite(value))
    return tuple(text for text in texts if text is not None)


def _risk(logits: Tensor, target: Target) -> Tensor:
    """Of logits (S, B, ..., K) one number (B, ...) that rises with the risk; see docs/evaluation.md."""
    logits = logits.double()
    match target:
        case ClassTarget():
            probability = logits.softmax(-1).mean(0)
            return probability[..., 1] if probability.shape[-1] == 2 else torch.full_like(probability[..., 0], torch.nan)
        case MultiLabelTarget():
            return logits.sigmoid().mean(0).mean(-1)
        case SurvivalTarget():
            return -(1 - logits.sigmoid().mean(0)).cumprod(-1).sum(-1)
        case _:
            return torch.full_like(logits[0, ..., 0], torch.nan)
