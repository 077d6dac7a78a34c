"""Activation checkpointing: what a block computes on its way is forgotten, and computed again when the gradient needs it.

Noise has no state and no block has any, so the second forward gives what the first gave and no result changes (Chen et al. 2016).
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Again = Callable[[nn.Module], AbstractContextManager[None]]


@runtime_checkable
class HasBlocks(Protocol):
    """A module that names those of its parts whose activations are worth forgetting: wide inside, narrow at their borders."""

    def checkpointed_blocks(self) -> Iterable[nn.Module]:
        """The blocks. None has buffers, none lies within another."""
        ...


def checkpoint_activations(model: nn.Module, again: Again = lambda block: nullcontext()) -> None:
    """Makes every block of a model keep its inputs alone; parameters keep their names.

    again: around the second forward of a block.

    Raises:
        ValueError: a block has buffers: a running mean would move twice.
    """
    for part in list(model.modules()):
        if isinstance(part, HasBlocks):
            for block in part.checkpointed_blocks():
                _forget(block, again)


def _forget(block: nn.Module, again: Again) -> None:
    if any(True for _ in block.buffers()):
        raise ValueError(f"a block that is computed twice has buffers: {type(block).__name__}")
    inner: Callable[..., object] = block.forward

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), again(block)

    def forward(*inputs: object) -> object:
        if not torch.is_grad_enabled():
            return inner(*inputs)
        # To its end the second time too: hooks after a module would be left out where it stops half-way.
        return checkpoint(inner, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, early_stop=False)

    block.forward = forward
