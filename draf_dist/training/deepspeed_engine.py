"""Many processes with DeepSpeed: ZeRO 0-3 over torch.distributed, gloo on CPU and NCCL on GPU.

A checkpoint holds whole tensors under the names that TorchFiles uses, so it can be read by any number of ranks, any ZeRO stage
and one process; no pickle. All ranks gather, rank 0 writes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.utils import register_output_backward_hooks
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state, safe_set_local_optimizer_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from draf_dist.errors import SpecError, explain
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.torch_engine import MODEL_FILE, OPTIMIZER_FILE, load_weights

# Adam's state beside its step counter.
MOMENTS = ("exp_avg", "exp_avg_sq")
# ZeRO 3 leaves parameters with fewer elements whole: gathering them costs more than it saves.
WHOLE_BELOW = 100_000
# Gradient elements that are reduced at once.
LARGEST_BUCKET = 500_000_000

T = TypeVar("T")


class DeepSpeedEngine:
    """DeepSpeed behind the three members of `Engine`; every rank makes the same calls in the same order."""

    def __init__(self, engine: Any, *, accumulation: int) -> None:
        self._engine = engine
        self._accumulation = accumulation
        self._num_backward = 0
        # DeepSpeed divides by both: its gradient is a mean over ranks and micro-batches, ours is a sum.
        self._scale = float(dist.get_world_size() * accumulation)

    @property
    def module(self) -> nn.Module:
        """The model to call."""
        module: nn.Module = self._engine.module
        return module

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a scalar loss of this rank and micro-batch."""
        if self._num_backward == self._accumulation:
            raise ValueError(f"backward was called more than {self._accumulation} times before step")
        self._num_backward += 1
        loss = loss * self._scale
        self._engine.set_gradient_accumulation_boundary(self._num_backward == self._accumulation)
        # DeepSpeed's own forward does both, but finds no tensors in an output that is a dataclass; the loss is one for certain.
        if isinstance(self._engine.optimizer, ZeROOptimizer):
            self._engine.optimizer.clear_backward_seen_flag()
        register_output_backward_hooks(loss, self._engine._backward_prologue, self._engine._backward_prologue_per_tensor)
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        """Clips and applies the gradient, then forgets it; returns its global norm before clipping."""
        if self._num_backward != self._accumulation:
            raise ValueError(f"step needs {self._accumulation} calls of backward, found {self._num_backward}")
        self._num_backward = 0
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None if isinstance(self._engine.optimizer, ZeROOptimizer) else self._norm_of_whole_gradients()
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def _norm_of_whole_gradients(self) -> Tensor:
        # Without ZeRO every rank holds the reduced gradient, and DeepSpeed has no norm unless it clips.
        return get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])


@dataclass(frozen=True)
class DeepSpeedFiles:
    """Parameters and optimizer state as whole tensors, whatever the ranks share among them."""

    engine: Any
    zero_stage: int

    def save(self, folder: Path) -> None:
        """Gathers on all ranks; rank 0 writes into its local folder."""
        weights, optimizer = self._weights(), self._optimizer_state()
        if dist.get_rank() == 0:
            save_file(weights, folder / MODEL_FILE)
            save_file(optimizer, folder / OPTIMIZER_FILE)
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Restores what `save` or TorchFiles wrote, bit for bit; every rank reads both files.

        Raises:
            DataError: the checkpoint holds other parameters than the model.
        """
        module, optimizer = self.engine.module, self.engine.optimizer
        with self._gathered(list(module.parameters()), modified=True):
            load_weights(module, folder / MODEL_FILE)
        if self.zero_stage > 0:
            optimizer.refresh_fp32_params()
        stored = load_file(folder / OPTIMIZER_FILE)
        steps = [value for key, value in stored.items() if key.startswith("step.")]
        if not steps:
            return
        self._make_optimizer_state(torch.stack(steps).max())
        for name, parameter in module.named_parameters():
            for kind in MOMENTS:
                if f"{kind}.{name}" in stored:
                    self._set_moment(parameter, kind, stored[f"{kind}.{name}"].to(parameter.device))

    def _weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in self.engine.module.state_dict(keep_vars=True).items():
            with self._gathered([value] if isinstance(value, nn.Parameter) else [], modified=False):
                found[name] = _stored(value)
        return found

    def _optimizer_state(self) -> dict[str, Tensor]:
        state = self.engine.optimizer.optimizer.state if self.zero_stage > 0 else self.engine.optimizer.state
        held = next((state[owner] for owner in self._owners() if owner in state and state[owner]), None)
        if held is None:
            return {}
        found: dict[str, Tensor] = {}
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                found[f"step.{name}"] = _stored(held["step"])
                found |= {f"{kind}.{name}": _stored(self._moment(parameter, kind)) for kind in MOMENTS}
        return found

    def _moment(self, parameter: nn.Parameter, kind: str) -> Tensor:
        moment: Tensor
        if self.zero_stage == 0:
            moment = self.engine.optimizer.state[parameter].get(kind, torch.zeros_like(parameter))
        else:
            moment = safe_get_full_optimizer_state(parameter, kind)
        return moment

    def _set_moment(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        if self.zero_stage == 0:
            self.engine.optimizer.state[parameter][kind].copy_(value)
        elif self.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, value, kind)
        else:
            # DeepSpeed's setter of whole tensors fails where a parameter can't be cut evenly; its parts are of one size, padded.
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
            safe_set_local_optimizer_state(parameter, padded.narrow(0, size * dist.get_rank(), size), kind)

    def _owners(self) -> list[Tensor]:
        """The tensors that Adam keeps state of: flat parts of the parameters under ZeRO."""
        optimizer = self.engine.optimizer
        if self.zero_stage == 0:
            return [p for p in self.engine.module.parameters() if p.requires_grad]
        flat: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self.zero_stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        return flat

    def _make_optimizer_state(self, step: Tensor) -> None:
        """State as after the first step, which an engine that never stepped does not have yet."""
        optimizer = self.engine.optimizer
        state = optimizer.optimizer.state if self.zero_stage > 0 else optimizer.state
        for owner in self._owners():
            for kind in MOMENTS:
                state[owner].setdefault(kind, torch.zeros_like(owner)).zero_()
            state[owner]["step"] = step.clone()
        if self.zero_stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()

    @contextmanager
    def _gathered(self, parameters: list[nn.Parameter], *, modified: bool) -> Iterator[None]:
        """Parameters whole while entered; if modified, what rank 0 left in them stays."""
        if self.zero_stage < 3 or not parameters:
            yield
            return
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modified else None):
            yield


@dataclass(frozen=True)
class DeepSpeedRanks:
    """This process as one rank of the default process group, which whoever started it has set up.

    Raises:
        SpecError: there is no process group.
    """

    config: DeepSpeedConfig
    device: torch.device
    threads: int = 1

    def __post_init__(self) -> None:
        if not dist.is_initialized():
            remedy = "Start the ranks through a launcher, or leave `kind: deepspeed` out of the profile."
            raise SpecError(explain("profile", expected="a process group", found="none", remedy=remedy))

    @property
    def rank(self) -> int:
        """This rank in [0, world)."""
        return dist.get_rank()

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size()

    @property
    def accumulation(self) -> int:
        """Micro-batches per step and rank."""
        return self.config.accumulation

    def reduce(self, values: Tensor) -> Tensor:
        """The sum over ranks, in f64: the same on every rank, and next to independent of how rows were cut."""
        total = values.to(torch.float64, copy=True)
        dist.all_reduce(total)
        return total

    def start(self, module: nn.Module, config: OptimizerConfig) -> tuple[DeepSpeedEngine, DeepSpeedFiles]:
        """Adam with decoupled weight decay: torch's own, so that one process gives the same steps."""
        if self.device.type == "cpu":
            skip_compiled_operators()
        # DeepSpeed takes its device from here.
        os.environ["LOCAL_RANK"] = str(self.device.index or 0)
        module = module.to(self.device)
        if self.config.precision == "bf16":
            compute_in_bf16(module, self.device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        config_dict = settings(self.config, config.clip_norm, sum(p.numel() for p in module.parameters()))
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config_dict)
        files = DeepSpeedFiles(engine, self.config.zero_stage)
        return DeepSpeedEngine(engine, accumulation=self.config.accumulation), files


def settings(config: DeepSpeedConfig, clip_norm: float | None, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. Clipping is spelled out because it is on by default."""
    # ZeRO 2 allocates a bucket at every backward, 2 GB by default, and deterministic torch fills what it allocates.
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": min(num_parameters, LARGEST_BUCKET)}
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = WHOLE_BELOW
    return {
        # The true batch is the loader's business: ranks may hold different numbers of rows, so there is no global size to give.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def skip_compiled_operators() -> None:
    """Keeps DeepSpeed from compiling a shared-memory all-reduce on the CPU, which takes a minute; gloo does the same."""
    deepspeed.ops.__compatible_ops__ = {}


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


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
