"""Plain torch in one process; also the oracle that every other engine is measured against."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from draf_dist.errors import DataError, explain
from draf_dist.training.activation_checkpointing import checkpoint_activations
from draf_dist.training.adamw import AdamW
from draf_dist.training.backend import DECODE_THREADS
from draf_dist.training.decay import decay_groups
from draf_dist.training.fragments import KINDS_OF_ADAM, Fragment, Kind, WholeTensors, kind_of, whole
from draf_dist.training.job import OptimizerConfig


class TorchEngine:
    """An optimizer, and clipping only where the job asks for it."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, *, clip_norm: float | None) -> None:
        self._module = module
        self._optimizer = optimizer
        self._clip_norm = clip_norm

    @property
    def module(self) -> nn.Module:
        """The model to call."""
        return self._module

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a scalar loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        """Clips and applies the gradient, then forgets it; returns its global norm before clipping."""
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        if self._clip_norm is not None:
            clip_grads_with_norm_(self._module.parameters(), self._clip_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)


@dataclass(frozen=True)
class TorchFiles:
    """See EngineFiles: one process owns everything. Parameters that never had a gradient have no optimizer state."""

    module: nn.Module
    optimizer: Optimizer

    def fragments(self) -> list[Fragment]:
        """All parameters and buffers, and Adam's state."""
        tensors = self.module.state_dict(keep_vars=True)
        weights = [whole(kind_of(value), name, value) for name, value in tensors.items()]
        state = self.optimizer.state
        named = ((name, state[p]) for name, p in self.module.named_parameters() if p in state)
        return weights + [whole(cast(Kind, kind), name, value) for name, held in named for kind, value in held.items()]

    def load(self, state: WholeTensors) -> None:
        """Restores a state, bit for bit.

        Raises:
            DataError: it holds other parameters than the model.
        """
        load_weights(self.module, state.weights())
        parameters = dict(self.module.named_parameters())
        for kind in KINDS_OF_ADAM:
            for name in state.of(kind):
                value = state[f"{kind}/{name}"]
                # Adam keeps its step counter on the CPU, its moments beside the parameter.
                home = value if kind == "step" else value.to(parameters[name].device)
                self.optimizer.state[parameters[name]][kind] = home


@dataclass(frozen=True)
class OneProcess:
    """The whole run in this process. accumulation cuts every batch into that many micro-batches, to fit into memory.

    activation_checkpointing: blocks of the model are computed again in backward, for the same reason.
    """

    threads: int = 1
    accumulation: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    decode_threads: int = DECODE_THREADS
    activation_checkpointing: bool = False

    def reduce(self, values: Tensor) -> Tensor:
        """The sum over one rank."""
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of one rank."""
        return rows

    def start(self, module: nn.Module, config: OptimizerConfig) -> tuple[TorchEngine, TorchFiles]:
        """Adam with decoupled weight decay, see decay_groups."""
        module = module.to(self.device)
        if self.activation_checkpointing:
            checkpoint_activations(module)
        optimizer = AdamW(decay_groups(module, config.weight_decay), config.learning_rate, weight_decay=config.weight_decay)
        return TorchEngine(module, optimizer, clip_norm=config.clip_norm), TorchFiles(module, optimizer)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fills a module with all parameters and buffers of a checkpoint, by name.

    Raises:
        DataError: they are not those of the model.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        found = str(error).splitlines()[-1].strip()
        remedy = "It was written by another version of the code: go back to that version, or start with --fresh."
        raise DataError(explain("checkpoint", expected="the parameters of this model", found=found, remedy=remedy)) from error
