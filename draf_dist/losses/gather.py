"""Rows of all ranks for losses that couple the whole global batch (rule D3): what is gathered, and how."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Embeddings:
    """Two views of N studies: first, second f32 (N, Z); uid int64 (N,); valid bool (N,), False for padding and absent rows.

    What first and second hold in rows that are not valid is never looked at, NaN included.
    """

    first: Tensor
    second: Tensor
    uid: Tensor
    valid: Tensor


# Local embeddings to those of the global batch, with a gradient to every rank. A collective: all ranks call it.
Gather = Callable[[Embeddings], Embeddings]


def one_process(local: Embeddings) -> Embeddings:
    """The local rows are the global ones."""
    return local


class AllGather:
    """The rows of all ranks of a process group; ranks may have different numbers of rows, also none.

    Rows are padded to the longest rank, and padding is not valid. The backward sums over ranks what each asks of a row, so the
    sum of the ranks' gradients is that of one process on the whole batch.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __call__(self, local: Embeddings) -> Embeddings:
        """Embeddings of W times the longest rank's rows, in the order of ranks."""
        rows = local.uid.shape[0]
        missing = self._longest(local.uid) - rows
        labels = functional.pad(torch.stack([local.uid, local.valid.to(local.uid.dtype)]), (0, missing))
        uid, valid = torch.cat(_from_all(labels, self.group), dim=1)
        # One differentiable collective: two could meet in another order in the backward of another rank.
        views = functional.pad(torch.stack([local.first, local.second]), (0, 0, 0, missing))
        parts: Tensor = _Gathered.apply(views, self.group)  # type: ignore[no-untyped-call]
        first, second = parts.transpose(0, 1).flatten(1, 2)
        return Embeddings(first, second, uid, valid.bool())

    def _longest(self, uid: Tensor) -> int:
        rows = torch.tensor(uid.shape[0], device=uid.device)
        dist.all_reduce(rows, dist.ReduceOp.MAX, group=self.group)
        return int(rows)


def _from_all(values: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return parts


class _Gathered(torch.autograd.Function):
    """(W, *values.shape) of all ranks. torch's own differentiable all_gather is deprecated and its heir is private."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return torch.stack(_from_all(values, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        asked = gradient.clone()
        dist.all_reduce(asked, group=ctx.group)
        return asked[dist.get_rank(ctx.group)], None
