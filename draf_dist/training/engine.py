"""What the loop needs of whoever holds the parameters: one process, or many with DeepSpeed."""

from typing import Protocol

from torch import Tensor, nn


class Engine(Protocol):
    """The parameters and their optimizer.

    One step is `backward` once for every micro-batch, then `step` once. The gradient that `step` applies is the sum over ranks and
    micro-batches of the gradients of the losses given to `backward`: the loop has divided them by the global weight already.
    """

    @property
    def module(self) -> nn.Module:
        """The model to call."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a scalar loss of this rank and micro-batch."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clips and applies the gradient, then forgets it; returns its global norm before clipping."""
        ...
