"""AdamW without torch's compiler."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.optim import Adam, Optimizer


def _as_written(method: Callable[..., Any]) -> Any:
    """The function itself, where torch keeps its compiler from tracing into it."""
    return cast(Any, method).__wrapped__


class AdamW(torch.optim.AdamW):
    """torch's own AdamW, step for step and bit for bit; and it imports no compiler.

    torch tells its compiler to leave an optimizer's methods alone, and imports the compiler to tell it so: three seconds of every
    rank's start, also after a failure. Nothing here is compiled, so there is nobody to tell.
    """

    add_param_group = _as_written(Optimizer.add_param_group)
    load_state_dict = _as_written(Optimizer.load_state_dict)
    state_dict = _as_written(Optimizer.state_dict)
    zero_grad = _as_written(Optimizer.zero_grad)
    # torch's wrapper turns gradients off too, unless a step is to be differentiated.
    step = torch.no_grad()(_as_written(Adam.step))
