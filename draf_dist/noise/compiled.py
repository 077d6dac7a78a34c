"""Draws as operators that torch.compile does not look into: it sees a shape and leaves the bits alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Keys, shape of what every key gives, a parameter of the distribution.
KeyedDraw = Callable[[Tensor, tuple[int, ...], float], Tensor]


def opaque(name: str, draw: KeyedDraw, dtype: torch.dtype) -> KeyedDraw:
    """`draw`, whose results have the given dtype, as the operator draf_dist::name."""

    def call(keys: Tensor, shape: Sequence[int], parameter: float) -> Tensor:
        return draw(keys, tuple(shape), parameter)

    def describe(keys: Tensor, shape: Sequence[int], parameter: float) -> Tensor:
        return keys.new_empty((*keys.shape, *shape), dtype=dtype)

    schema = "(Tensor keys, SymInt[] shape, float parameter) -> Tensor"
    operator = torch.library.custom_op(f"draf_dist::{name}", call, mutates_args=(), schema=schema)
    operator.register_fake(describe)
    return operator
