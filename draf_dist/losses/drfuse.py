"""What DrFuse is trained with beside its predictions: orthogonality, agreement, the order of attention (spec 4.6, oracle O13).

The paper's, by its code; ours: any number of modalities, the second half of the divergence (`bernoulli`), classes and hazards as
outputs. Each is the published one for two modalities of which the first is always present. Features are (B, S, M, Z).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from draf_dist.schema.batch import ClassTarget, MultiLabelTarget, SurvivalTarget, Target, Term

Divergence = Literal["bernoulli", "published"]

# Of probabilities, so that the logarithm of what is left of 1 is finite.
_NEAR = 1e-7


def orthogonality(shared: Tensor, distinct: Tensor, present: Tensor, weight: Tensor) -> list[Term]:
    """|cos(shared, distinct)| of each of M modalities, mean over its passes and over the rows where it is present."""
    cosine = functional.cosine_similarity(shared, distinct, dim=-1).abs().mean(1)
    return [_mean(cosine[:, axis], present[:, axis], weight) for axis in range(present.shape[1])]


def shared_divergence(shared: Tensor, present: Tensor, weight: Tensor, reading: Divergence) -> Term:
    """Jensen-Shannon divergence of sigmoid(h_m) between modalities, in nats, summed over Z; mean over rows with two or more.

    bernoulli: mean over present m of KL(Bernoulli(p_m) || Bernoulli(pbar)), pbar their mean. published (spec 4.6 defect b): mean
    over all m, absent ones too, of p_m log(p_m / pbar) alone, summed over all rows, divided by the number of rows with two.
    """
    paired = present.sum(1) > 1
    if reading == "bernoulli":
        return _mean(_bernoulli(shared, present), paired, weight)
    every = torch.ones_like(present)
    return Term(numerator=(weight * _half(shared, every)).sum(), weight=(weight * paired).sum())


def ranking(attention: Tensor, losses: Tensor, there: Tensor, counted: Tensor, weight: Tensor) -> list[Term]:
    """One term for each pair of T tokens: more attention where the loss is lower.

    attention: (B, S, K, T). losses: (B, S, K, T) of the token's own prediction of each output. there: bool (B, T). counted: bool
    (B, K), which outputs are known. weight: (B,).
    A pair (x, y) costs max(0, -t (a_x - a_y)) with t = 1 where x has the lower loss, else -1, divided by the number of positive
    costs; only in rows with two or more modalities. With margin 0 equal attention costs nothing (spec 4.6 defect d).
    """
    rows = weight * (there.sum(1) > 2)
    tokens = range(there.shape[1])
    pairs = [(x, y) for x in tokens for y in range(x)]
    return [_pair(attention, losses.detach(), x, y, counted * (rows * there[:, x] * there[:, y])[:, None]) for x, y in pairs]


def _pair(attention: Tensor, losses: Tensor, x: int, y: int, weight: Tensor) -> Term:
    """Of two tokens; weight (B, K)."""
    sign = torch.where(losses[..., x] < losses[..., y], 1.0, -1.0)
    cost = functional.relu(-sign * (attention[..., x] - attention[..., y]))
    weighed = weight.unsqueeze(1) / cost.shape[1]
    return Term(numerator=(weighed * cost).sum(), weight=(weighed * (cost.detach() > 0)).sum())


def output_losses(logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """The loss (N, B, K) of each output of logits (N, B, K), and which outputs are known, bool (B, K).

    A label: -log sigmoid(+-logit). A hazard: the same of "the event is in this interval", known up to the interval of the time.
    A class [ours]: -log p_k of the true one and -log(1 - p_k) of the others, p the softmax: for two classes both are the loss.
    """
    match target:
        case MultiLabelTarget():
            truth, known = target.label, target.observed
        case SurvivalTarget():
            interval = torch.arange(logits.shape[-1], device=logits.device)
            last = target.interval.unsqueeze(1)
            truth, known = target.event.unsqueeze(1) & (interval == last), target.observed.unsqueeze(1) & (interval <= last)
        case ClassTarget():
            truth = functional.one_hot(target.label, logits.shape[-1]).bool()
            probability = logits.softmax(-1).clamp(_NEAR, 1 - _NEAR)
            losses = -torch.where(truth, probability, 1 - probability).log()
            return losses, target.observed.unsqueeze(1).expand_as(truth)
        case _:
            raise TypeError(f"{type(target).__name__} has no loss of one number an output")
    expected = truth.to(logits.dtype).expand_as(logits)
    return functional.binary_cross_entropy_with_logits(logits, expected, reduction="none"), known


def _bernoulli(shared: Tensor, present: Tensor) -> Tensor:
    """The divergence (B,) with both halves."""
    return _half(shared, present) + _half(-shared, present)


def _half(shared: Tensor, counted: Tensor) -> Tensor:
    """Mean over counted m of sum over Z of p_m log(p_m / pbar), p = sigmoid(h): (B,)."""
    there = counted[:, None, :, None]
    number = counted.sum(1).clamp_min(1).view(-1, 1, 1, 1)
    log_p = functional.logsigmoid(shared)
    # A row of which nothing is counted has no mean; its sum below is empty.
    mean = torch.where(there, log_p.exp(), 0.0).sum(2, keepdim=True) / number
    terms = torch.where(there, log_p.exp() * (log_p - mean.clamp_min(torch.finfo(mean.dtype).tiny).log()), 0.0)
    return (terms / number).sum((2, 3)).mean(1)


def _mean(values: Tensor, counted: Tensor, weight: Tensor) -> Term:
    """Mean of values (B,) over the rows that are counted, bool (B,)."""
    rows = weight * counted
    return Term(numerator=(rows * torch.where(counted, values, 0.0)).sum(), weight=rows.sum())
