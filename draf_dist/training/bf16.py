"""The model in bf16, everything around it in f32: parameters, optimizer state and losses keep their precision."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def compute_in_bf16(module: nn.Module, device: torch.device) -> None:
    """Makes the model run under autocast and return f32. Parameters stay f32.

    The cache of cast weights is off: under ZeRO 3 it would keep alive what is given back after use.
    """
    inner: Callable[..., object] = module.forward

    def forward(*inputs: object) -> object:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            return in_f32(inner(*inputs))

    module.forward = forward


def in_f32(value: T) -> T:
    """A tensor, or a dataclass, dict or tuple of such, with floating-point tensors as f32."""
    changed: Any = value
    if isinstance(value, Tensor):
        changed = value.float() if value.is_floating_point() else value
    elif isinstance(value, dict):
        changed = {name: in_f32(item) for name, item in value.items()}
    elif isinstance(value, tuple):
        changed = tuple(in_f32(item) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        changed = replace(value, **{f.name: in_f32(getattr(value, f.name)) for f in fields(value)})
    result: T = changed
    return result
