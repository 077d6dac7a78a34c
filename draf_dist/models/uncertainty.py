"""Uncertainty of one prediction from S Monte-Carlo passes, in probability and in logit space."""

from typing import Literal

from torch import Tensor

UncertaintyName = Literal["epistemic", "aleatoric", "total", "entropy", "mi"]
UncertaintySpace = Literal["probability", "logit", "prior_shifted"]

# A probability of exactly 0 contributes nothing; the floor only keeps the gradient of p log p finite there.
_TINY = 1e-30


def decompose(probability: Tensor) -> dict[str, Tensor]:
    """Every uncertainty of p_t, from (S, ..., K) to (...).

    The proposal's U_m = var_t p_t is called aleatoric + epistemic there but is the epistemic part only; by the law of total
    variance (spec 1.1 row 2), with pbar = mean_t p_t and variances that divide by S:
        epistemic = var_t p_t    aleatoric = mean_t p_t (1 - p_t)    total = pbar (1 - pbar) = aleatoric + epistemic
    summed over classes for K > 2 (the trace, at most 1 - 1/K), of p(class 1) alone for K = 2 (at most 1/4; row 3). In nats:
        entropy = H(pbar)        mi = mean_t KL(p_t || pbar) = H(pbar) - mean_t H(p_t)
    """
    scalar = probability[..., 1:] if probability.shape[-1] == 2 else probability
    mean, scalar_mean = probability.mean(0), scalar.mean(0)
    return {
        "epistemic": (scalar - scalar_mean).square().mean(0).sum(-1),
        "aleatoric": (scalar * (1 - scalar)).mean(0).sum(-1),
        "total": (scalar_mean * (1 - scalar_mean)).sum(-1),
        "entropy": entropy(mean),
        "mi": (probability * (_log(probability) - _log(mean))).sum(-1).mean(0),
    }


def entropy(probability: Tensor) -> Tensor:
    """H(p) in nats over the last axis; 0 log 0 is 0."""
    return -(probability * _log(probability)).sum(-1)


def logit_variance(logits: Tensor) -> Tensor:
    """Variance over passes of the logits, from (S, ..., K) to (...).

    Of the log odds z = l_1 - l_0 for K = 2; for K > 2 the trace over the centred logits [ours]. Var(p) is about
    [p (1 - p)]^2 Var(z), so this is the epistemic variance without the factor that makes it a risk score (findings 1).
    """
    centred = logits[..., 1:] - logits[..., :1] if logits.shape[-1] == 2 else logits - logits.mean(-1, keepdim=True)
    return (centred - centred.mean(0)).square().mean(0).sum(-1)


def _log(probability: Tensor) -> Tensor:
    return probability.clamp_min(_TINY).log()
