"""Reliability weights of the modalities and the fusion that uses them: pure functions of (B, M) tensors."""

import torch
from torch import Tensor

# U = 0 (all passes agree to the last bit) would take the whole weight, or make log U infinite.
_LEAST_UNCERTAINTY = 1e-8


def masked_softmax(logits: Tensor, present: Tensor) -> Tensor:
    """Softmax over the present entries of the last axis; exactly 0 elsewhere, and all 0 where nothing is present.

    A zero input gives a stable prediction, hence a low U: without the mask an absent modality would get the largest weight
    (spec 1.1 row 5). Equal logits give exactly 1 / n. In f32 at least: in half precision the weights would not sum to 1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lowest = torch.finfo(logits.dtype).min
    highest = logits.detach().masked_fill(~present, lowest).amax(-1, keepdim=True)
    exponent = torch.where(present, logits - highest, 0.0)
    unnormalised = torch.where(present, exponent.exp(), 0.0)
    return unnormalised / unnormalised.sum(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)


def equal_weights(present: Tensor) -> Tensor:
    """1 / (number present) where present, 0 elsewhere: the ablation of spec 1.3, and what alpha = 0 gives bit for bit."""
    return masked_softmax(torch.zeros(present.shape, device=present.device), present)


def softmax_logits(uncertainty: Tensor, alpha: Tensor | float) -> Tensor:
    """-alpha U, whose softmax is the proposal's r_m = exp(-alpha U_m) / sum_k exp(-alpha U_k)  (DRAF 3.2.2)."""
    return -alpha * uncertainty


def inverse_logits(uncertainty: Tensor) -> Tensor:
    """-log U, whose softmax is r_m = U_m^-1 / sum_k U_k^-1: weights by precision, free of scale (spec 1.1 row 4)."""
    return -log_uncertainty(uncertainty)


def learned_logits(uncertainty: Tensor, corruption: Tensor, log_weight: Tensor, corruption_weight: Tensor) -> Tensor:
    """The logits a log U_m - e c_hat_m; with b_m added their softmax is the learned reliability of findings 2."""
    return log_weight * log_uncertainty(uncertainty) - corruption_weight * corruption


def log_uncertainty(uncertainty: Tensor) -> Tensor:
    """Natural logarithm of U, with U floored at 1e-8."""
    return uncertainty.clamp_min(_LEAST_UNCERTAINTY).log()


def relative_entropy(weights: Tensor, present: Tensor) -> Tensor:
    """H(w) / log n in [0, 1] of weights (B, M) over n present modalities, (B,); 1 where n is 1."""
    entropy = -(weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(1)
    count = present.sum(1)
    return torch.where(count > 1, entropy / count.clamp_min(2).log(), 1.0)


def fuse(features: Tensor, reliability: Tensor) -> Tensor:
    """H = sum_m r_m h_m (DRAF 3.2.3), from (..., B, M, Z) and (B, M) to (..., B, Z)."""
    return (reliability.unsqueeze(-1) * features).sum(-2)
