"""Rows of all ranks for losses that couple the whole global batch (rule D3): what is gathered, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


class Rows(Protocol):
    """What a coupled loss looks at: a frozen dataclass of tensors whose first axis is the N rows.

    carried: the fields through which a gradient flows, at least one, all of one floating type. The others are what the loss knows
    of a row. valid: bool (N,), False for padding; what other fields hold there is never looked at, NaN included.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    carried: ClassVar[tuple[str, ...]]

    @property
    def valid(self) -> Tensor:
        """Which rows count."""


AnyRows = TypeVar("AnyRows", bound=Rows)


@dataclass(frozen=True)
class Embeddings:
    """Two views of N studies: first, second f32 (N, Z); uid int64 (N,); valid bool (N,), False for padding and absent rows."""

    first: Tensor
    second: Tensor
    uid: Tensor
    valid: Tensor
    carried: ClassVar[tuple[str, ...]] = ("first", "second")


class Gather(Protocol):
    """Local rows to those of the global batch, with a gradient to every rank. A collective: all ranks call it."""

    def __call__(self, local: AnyRows, /) -> AnyRows:
        """The rows of all ranks."""


def one_process(local: AnyRows, /) -> AnyRows:
    """The local rows are the global ones."""
    return local


def leaves(parts: Sequence[AnyRows]) -> AnyRows:
    """The rows of all parts, with nothing behind them and ready to collect a gradient (gradient caching, Gao et al. 2021)."""
    first = parts[0]
    joined = {field.name: torch.cat([getattr(rows, field.name) for rows in parts]) for field in fields(first)}
    return replace(first, **joined | {name: joined[name].detach().requires_grad_() for name in first.carried})


def carry(rows: AnyRows, gradients: Sequence[Tensor]) -> Tensor:
    """A scalar whose gradient is (d rows / d parameters) gradient, for the gradients of what they carry, in that order."""
    pairs = zip(rows.carried, gradients, strict=True)
    return torch.stack([(getattr(rows, name) * gradient).sum() for name, gradient in pairs]).sum()


class AllGather:
    """The rows of all ranks of a process group; ranks may have different numbers of rows, also none.

    Rows are padded to the longest rank, and padding is not valid. The backward sums over ranks what each asks of a row, so the
    sum of the ranks' gradients is that of one process on the whole batch.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __call__(self, local: AnyRows, /) -> AnyRows:
        """Rows of W times the longest rank's number, in the order of ranks."""
        missing = self._longest(local.valid) - local.valid.shape[0]
        known = {field.name: getattr(local, field.name) for field in fields(local) if field.name not in local.carried}
        # As bytes, so that integers, flags and times go together.
        bytes_ = {name: _flat(values).contiguous().view(torch.uint8) for name, values in known.items()}
        everyone = torch.cat(_from_all(_side_by_side(bytes_, missing), self.group))
        facts = {name: _typed(part, known[name]) for name, part in _apart(everyone, bytes_).items()}
        # One differentiable collective: two could meet in another order in the backward of another rank.
        carried = {name: getattr(local, name) for name in local.carried}
        parts: Tensor = _Gathered.apply(_side_by_side(carried, missing), self.group)  # type: ignore[no-untyped-call]
        return replace(local, **facts, **_apart(parts.flatten(0, 1), carried))

    def _longest(self, valid: Tensor) -> int:
        rows = torch.tensor(valid.shape[0], device=valid.device)
        dist.all_reduce(rows, dist.ReduceOp.MAX, group=self.group)
        return int(rows)


def _flat(values: Tensor) -> Tensor:
    """(N, ...) as (N, numbers of a row)."""
    return values.unsqueeze(-1).flatten(1)


def _side_by_side(values: Mapping[str, Tensor], missing: int) -> Tensor:
    """All numbers of a row in one, with so many rows of zeros below."""
    return functional.pad(torch.cat([_flat(part) for part in values.values()], dim=1), (0, 0, 0, missing))


def _apart(joined: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `_side_by_side` put together, of any number of rows."""
    widths = [_flat(part).shape[1] for part in like.values()]
    parts = zip(like.items(), torch.split(joined, widths, dim=1), strict=True)
    return {name: part.reshape(joined.shape[0], *values.shape[1:]) for (name, values), part in parts}


def _typed(raw: Tensor, like: Tensor) -> Tensor:
    """Bytes (N, ...) as what they were."""
    return raw.contiguous().view(like.dtype).reshape(raw.shape[0], *like.shape[1:])


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
