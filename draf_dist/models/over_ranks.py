"""Sums over the rows of all ranks inside a model, with a gradient to every rank; in one process its own rows are all there are."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's values. A collective, in backward too: all ranks call it equally often and in the same order.

    Every rank uses the sum, so backward adds up what all ranks ask of it: the sum of the ranks' gradients is that of one process.
    """
    if not _many_ranks():
        return values
    total: Tensor = _Summed.apply(values)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def maximum_over_ranks(values: Tensor) -> Tensor:
    """The largest of every rank's values, without gradient. A collective."""
    if not _many_ranks():
        return values
    largest = values.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def _many_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        asked = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(asked)
        return asked
