"""Cox's partial likelihood over the whole global batch, as (numerator, weight) over the local events."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from draf_dist.losses.gather import Gather, one_process
from draf_dist.schema.batch import Term

Ties = Literal["efron", "breslow"]


@dataclass(frozen=True)
class Risks:
    """What the loss looks at of N studies. log_risk: f32 (N, S), s of h(t) = h_0(t) exp(s), of S passes.

    time: f32 (N,), of the event or of the last time seen. event: bool (N,). valid: bool (N,), False for padding and where nothing
    is known of the outcome.
    """

    log_risk: Tensor
    time: Tensor
    event: Tensor
    valid: Tensor
    carried: ClassVar[tuple[str, ...]] = ("log_risk",)


def cox(local: Risks, *, ties: Ties = "efron", gather: Gather = one_process) -> Term:
    """The mean over all events i of log [sum over j with t_j >= t_i of exp(s_j)] - s_i, and over passes (Cox 1972).

    j runs over the valid rows of the global batch, so that a batch is a sample of the risk set; whoever is censored at t_i is at
    risk then. Of d events at one time, with E the sum of their exp(s) and R that of all at risk:
        breslow    d log R                                  (Breslow 1974)
        efron      sum over l = 0 .. d - 1 of log(R - l / d E)    (Efron 1977)
    each event being charged a d-th of it. A study that was drawn twice counts as two. Without an event the weight is 0.

    Computed in f32 at least, whatever the caller's autocast says. Time and memory rise with (local rows) x (global rows).
    """
    with torch.autocast(local.log_risk.device.type, enabled=False):
        mine = _cleared(local)
        rows = gather(mine)
        counted = mine.valid & mine.event
        at_risk = rows.valid & (rows.time >= mine.time[:, None])
        total = _log_sum(rows.log_risk, at_risk, counted)
        if ties == "efron":
            total = total + _tie_correction(mine, rows, total, counted)
        losses = torch.where(counted, (total - mine.log_risk).mean(1), 0.0)
        return Term(numerator=losses.sum(), weight=counted.to(losses.dtype).sum())


def _cleared(local: Risks) -> Risks:
    """Log risks in f32 at least, 0 where a row is not valid."""
    wide = local.log_risk.to(torch.promote_types(local.log_risk.dtype, torch.float32))
    return replace(local, log_risk=torch.where(local.valid[:, None], wide, 0.0))


def _log_sum(log_risk: Tensor, among: Tensor, counted: Tensor) -> Tensor:
    """Log of the sum of exp(s), s (R, S), over those among (N, R), to (N, S); finite also in rows that are not counted, (N,)."""
    chosen = (among | ~counted[:, None])[:, :, None]
    return torch.logsumexp(torch.where(chosen, log_risk, -torch.inf), dim=1)


def _tie_correction(mine: Risks, rows: Risks, total: Tensor, counted: Tensor) -> Tensor:
    """Efron's mean over l of log(R - l / d E) less Breslow's log R, (N, S)."""
    tied = rows.valid & rows.event & (rows.time == mine.time[:, None])
    share = torch.exp(_log_sum(rows.log_risk, tied, counted) - total)
    number = torch.where(counted, tied.sum(1), 1).to(share.dtype)[:, None]
    # l / d for l < d, else 0, whose logarithm adds nothing.
    step = torch.arange(tied.shape[1], device=tied.device, dtype=share.dtype)
    fraction = torch.where(step < number, step / number, 0.0)
    return torch.log1p(-fraction[:, :, None] * share[:, None, :]).sum(1) / number
