"""NT-Xent, the contrastive loss of SimCLR, over the whole global batch, as (numerator, weight) over the local anchors."""

import torch
from torch import Tensor
from torch.nn import functional

from draf_dist.losses.gather import Embeddings, Gather, one_process
from draf_dist.schema.batch import Term


def nt_xent(local: Embeddings, *, tau: float, gather: Gather = one_process) -> Term:
    """The mean over all 2N valid rows z of -log [exp(s(z, z+) / tau) / sum_k exp(s(z, z_k) / tau)], s the cosine.

    z+ is the other view of the same row; k runs over z+ and over both views of every study of the global batch with another
    uid (Chen et al. 2020, eq. 1). Both views are anchors and the mean is taken, where the BSSL proposal sums over the first view
    alone (spec 3.1). A study that was drawn twice is no negative of itself.

    Computed in f32 at least, whatever the caller's autocast says: at tau .1 half precision is too coarse.
    """
    with torch.autocast(local.first.device.type, enabled=False):
        mine = _unit(local)
        rows = gather(mine)
        anchors, others = torch.cat([mine.first, mine.second]), torch.cat([rows.first, rows.second])
        positive = (mine.first * mine.second).sum(1).repeat(2) / tau
        negative = (local.uid[:, None] != rows.uid) & rows.valid
        similarity = torch.where(negative.repeat(2, 2), anchors @ others.T / tau, -torch.inf)
        total = torch.logsumexp(torch.cat([positive[:, None], similarity], dim=1), dim=1)
        weight = local.valid.repeat(2).to(positive.dtype)
        return Term(numerator=(weight * (total - positive)).sum(), weight=weight.sum())


def _unit(local: Embeddings) -> Embeddings:
    """Both views on the unit sphere; 0 where a row is not valid."""

    def unit(values: Tensor) -> Tensor:
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return functional.normalize(torch.where(local.valid[:, None], wide, 0.0), dim=1)

    return Embeddings(unit(local.first), unit(local.second), local.uid, local.valid)
