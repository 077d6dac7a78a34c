"""Plain torch in one process; also the oracle that every other engine is measured against."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from draf_dist.errors import DataError, explain
from draf_dist.training.job import OptimizerConfig

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


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
    """Parameters and optimizer state of one process, as safetensors."""

    module: nn.Module
    optimizer: Optimizer

    def save(self, folder: Path) -> None:
        """Writes parameters and optimizer state into a local folder."""
        (folder / MODEL_FILE).write_bytes(to_safetensors(_on_cpu(self.module.state_dict())))
        (folder / OPTIMIZER_FILE).write_bytes(to_safetensors(_on_cpu(self.moments())))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, bit for bit.

        Raises:
            DataError: the checkpoint holds other parameters than the model.
        """
        load_weights(self.module, folder / MODEL_FILE)
        parameters = dict(self.module.named_parameters())
        for key, value in load_file(folder / OPTIMIZER_FILE).items():
            kind, name = key.split(".", 1)
            # Adam keeps its step counter on the CPU, its moments beside the parameter.
            home = value if kind == "step" else value.to(parameters[name].device)
            self.optimizer.state[parameters[name]][kind] = home

    def moments(self) -> dict[str, Tensor]:
        """Adam's state as `<kind>.<parameter name>`; parameters that never had a gradient have none."""
        state = self.optimizer.state
        named = self.module.named_parameters()
        return {f"{kind}.{name}": value for name, p in named if p in state for kind, value in state[p].items()}


@dataclass(frozen=True)
class OneProcess:
    """The whole run in this process. accumulation cuts every batch into that many micro-batches, to fit into memory."""

    threads: int = 1
    accumulation: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1

    def reduce(self, values: Tensor) -> Tensor:
        """The sum over one rank."""
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of one rank."""
        return rows

    def start(self, module: nn.Module, config: OptimizerConfig) -> tuple[TorchEngine, TorchFiles]:
        """Adam with decoupled weight decay."""
        module = module.to(self.device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        return TorchEngine(module, optimizer, clip_norm=config.clip_norm), TorchFiles(module, optimizer)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fills a module from a safetensors file.

    Raises:
        DataError: the file holds other parameters than the model.
    """
    try:
        module.load_state_dict(load_file(path))
    except RuntimeError as error:
        found = str(error).splitlines()[-1].strip()
        remedy = "It was written by another version of the code: go back to that version, or start with --fresh."
        raise DataError(explain(path.name, expected="the parameters of this model", found=found, remedy=remedy)) from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Cloned so that views of one storage are written as tensors of their own.
    return {name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
