"""The likelihood of a time to an event, from the hazards of its intervals; see cox.py for a likelihood without intervals."""

import torch
from torch import Tensor
from torch.nn import functional


def survival_nll(logits: Tensor, interval: Tensor, event: Tensor, *, uncensored: float = 0.4) -> Tensor:
    """The weighted negative log-likelihood (N, B) of logits (N, B, K); interval and event (B,) as in SurvivalTarget.

    With hazards h_k = sigmoid(logit_k), S(k) = prod_(j <= k) (1 - h_j) and S(-1) = 1, for a time in interval k:
        event     -log S(k - 1) - log h_k
        censored  -log S(k), weighted by 1 - uncensored
    HEALNet's loss (spec 4.5, oracle O14), whose `uncensored` (there alpha) of .4 gives an event the weight
    (1 - .4) + .4 = 1 and a censored time .6. `uncensored` 0 is the plain likelihood.

    Computed in f32 at least: in half precision a sum over intervals loses what a late one adds.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    survive, die = functional.logsigmoid(-logits), functional.logsigmoid(logits)
    index = interval.expand(logits.shape[0], -1).unsqueeze(-1)
    # log S(k), with S(-1) = 1 in front.
    log_survival = functional.pad(survive.cumsum(-1), (1, 0))
    before, upto = log_survival.gather(-1, index), log_survival.gather(-1, index + 1)
    with_event = -(before + die.gather(-1, index))
    return torch.where(event, with_event.squeeze(-1), -(1 - uncensored) * upto.squeeze(-1))
