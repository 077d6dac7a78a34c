"""What attention maps are asked to agree with: uncertainty, an expert's map, the body (BSSL proposal 2.3.2-2.3.3; spec 3.6).

The proposal has its lambdas within these losses and once more in L_total; here they are without, and each is weighted once.
Attention is f32 (B, *space) and sums to 1 over the places of a row; weight f32 (B,).
"""

from typing import Literal

import torch
from torch import Tensor

from draf_dist.schema.batch import Term

AttentionTarget = Literal["uncertainty", "confidence"]
ClinicalScaling = Literal["peak", "density"]
_LEAST = 1e-8


def uncertainty_alignment(attention: Tensor, uncertainty: Tensor, weight: Tensor, *, target: AttentionTarget) -> Term:
    """The mean over rows of KL(A || U~) = sum over places of A ln(A / U~), in nats; uncertainty (B, *space).

    `uncertainty`, the proposal's D_KL(A || U): U~ = (U + 1e-8) / sum (U + 1e-8). That draws attention *towards* what the model is
    unsure of, while its item 1 damps attention there and L_clinical draws it to the finding; so also `confidence` [ours]:
    U~ = softmax(-U / s), s the standard deviation of U over the places of the row. Without the detached U the network would reshape
    its uncertainty to please the loss.
    """
    log_target = _log_target(uncertainty.detach().flatten(1), target)
    found = attention.flatten(1)
    # Not xlogy: where a weight has underflowed to 0 its gradient is infinite.
    divergence = (found * (found.clamp_min(torch.finfo(found.dtype).tiny).log() - log_target)).sum(1)
    return Term((weight * divergence).sum(), weight.sum())


def clinical_alignment(attention: Tensor, expert: Tensor, known: Tensor, weight: Tensor, *, scaling: ClinicalScaling) -> Term:
    """The mean over rows with an expert's map M (B, *space) in [0, 1] of its MSE with A; known: bool (B,), which rows have one.

    A is of the order 1 / places and M of the order 1, so the proposal's MSE(A, M) compares what can't be equal. `peak`: A / max A
    with M. `density`: both times the number of places after M is made to sum to 1. A map without a finding has no density: with
    `density` such a row counts nothing.
    """
    found, wanted = attention.flatten(1), torch.where(known[:, None], expert.flatten(1), 0.0)
    if scaling == "peak":
        difference = found / found.amax(1, keepdim=True) - wanted
    else:
        total = wanted.sum(1, keepdim=True)
        known = known & (total.squeeze(1) > 0)
        difference = found.shape[1] * (found - wanted / total.clamp_min(_LEAST))
    counted = weight * known
    return Term((counted * torch.where(known, difference.square().mean(1), 0.0)).sum(), counted.sum())


def anatomical(attention: Tensor, body: Tensor, known: Tensor, weight: Tensor) -> Term:
    """The mean over rows with a body mask of sum A (1 - body), the attention outside of it; body bool (B, *space)."""
    outside = torch.where(body, 0.0, attention).flatten(1).sum(1)
    counted = weight * known
    return Term((counted * torch.where(known, outside, 0.0)).sum(), counted.sum())


def _log_target(uncertainty: Tensor, target: AttentionTarget) -> Tensor:
    """The logarithm of U~ of U (B, places)."""
    if target == "uncertainty":
        raised = uncertainty + _LEAST
        return (raised / raised.sum(1, keepdim=True)).log()
    scale = uncertainty.std(1, correction=0, keepdim=True).clamp_min(_LEAST)
    return (-uncertainty / scale).log_softmax(1)
