"""Auxiliary corruption detection: the loss of the corruption head, as (numerator, weight) over the local rows."""

import torch
from torch import Tensor
from torch.nn import functional

from draf_dist.schema.batch import Term


def acd(logits: Tensor, corrupted: Tensor, present: Tensor, weight: Tensor) -> Term:
    """mean_i sum over present m of -[c_m log c_hat_m + (1 - c_m) log(1 - c_hat_m)], all (B, M), weight (B,).

    L_aux of the DRAF proposal, 3.2.4, which sums over all m and leaves out the samples: an absent modality has no c_m (spec
    1.1 row 8). At full presence it is literal. Labels play no part.
    """
    losses = functional.binary_cross_entropy_with_logits(logits, corrupted.to(logits.dtype), reduction="none")
    return Term(numerator=(weight * torch.where(present, losses, 0.0).sum(1)).sum(), weight=weight.sum())
