"""The KL divergence of Gaussian weights from their prior, and how much of it a step counts (BSSL proposal 2.4; spec 3.4, D8)."""

import math

from torch import Tensor

from draf_dist.schema.batch import Term


def gaussian_kl(moments: Tensor, *, prior_sigma: float) -> Tensor:
    """The sum over weights of KL(N(mu, sigma^2) || N(0, s^2)) in nats, of moments (..., 4) as of models/variational.py, to (...).

    Per weight ln(s / sigma) + (sigma^2 + mu^2) / (2 s^2) - 1/2 (oracle O7). Summed, never averaged: the mean over weights, which
    libraries give, is no evidence lower bound.
    """
    count, log_sigma, sigma_squared, mean_squared = moments.unbind(-1)
    return count * (math.log(prior_sigma) - 0.5) - log_sigma + (sigma_squared + mean_squared) / (2 * prior_sigma**2)


def kl_term(moments: Tensor, weight: Tensor, *, prior_sigma: float, scale: float) -> Term:
    """The divergence as a term of rows: moments (B, 4), the same in every row, and weight (B,).

    Every rank holds the same divergence, and terms are divided by the weight of the global batch: with each row's share of the
    weight above and below, the mean is the divergence itself, however many ranks and micro-batches there are (rule D8).
    """
    return Term((weight * gaussian_kl(moments, prior_sigma=prior_sigma)).sum(), weight.sum(), scale)


def kl_warmup(step: int, num_steps: int, fraction: float) -> float:
    """The share of the divergence that step `step`, from 0, of num_steps counts: rises evenly to 1 over the first fraction."""
    return min(1.0, (step + 1) / max(fraction * num_steps, 1.0))
