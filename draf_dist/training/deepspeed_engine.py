"""Many processes with DeepSpeed: ZeRO 0-3 over torch.distributed, gloo on CPU and NCCL on GPU.

A checkpoint holds whole tensors under the names that TorchFiles uses, so it can be read by any number of ranks, any ZeRO stage
and one process; no pickle. All ranks gather, rank 0 writes.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import WARNING, LogRecord
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import get_total_norm

from draf_dist.errors import SpecError, explain
from draf_dist.training.bf16 import compute_in_bf16
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.not_imported import not_imported
from draf_dist.training.reached import Reached
from draf_dist.training.torch_engine import MODEL_FILE, OPTIMIZER_FILE, load_weights

# DeepSpeed's autotuner imports MLflow wherever it is installed: a quarter of the time that a rank takes to start.
with not_imported("mlflow"):
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.utils import register_output_backward_hooks
    from deepspeed.utils import logger, safe_get_full_optimizer_state, safe_set_full_optimizer_state, safe_set_local_optimizer_state

# Adam's state beside its step counter.
MOMENTS = ("exp_avg", "exp_avg_sq")
# ZeRO 3 leaves parameters with fewer elements whole: gathering them costs more than it saves.
WHOLE_BELOW = 100_000
# Gradient elements that are reduced at once.
LARGEST_BUCKET = 500_000_000
# ZeRO 3 puts its own in place of this one, for the whole process.
TORCH_LINEAR = functional.linear


class DeepSpeedEngine:
    """DeepSpeed behind the three members of `Engine`; every rank makes the same calls in the same order."""

    def __init__(self, engine: Any, *, accumulation: int) -> None:
        self._engine = engine
        self._accumulation = accumulation
        self._num_backward = 0
        # DeepSpeed divides by both: its gradient is a mean over ranks and micro-batches, ours is a sum.
        self._scale = float(dist.get_world_size() * accumulation)
        self._reached: Reached | None = Reached.watch(engine.module)

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
        if self._reached is not None:
            self._reached.check()
            self._reached = None
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
        """Gathers tensor by tensor on all ranks; rank 0 keeps them, and writes into its local folder."""
        first = dist.get_rank() == 0
        for name, gathered in ((MODEL_FILE, self._weights()), (OPTIMIZER_FILE, self._optimizer_state())):
            # Every rank runs through the iterator: what is in it is gathered on the way.
            whole = {key: _stored(value) for key, value in gathered if first}
            if first:
                (folder / name).write_bytes(to_safetensors(whole))
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
        with safe_open(folder / OPTIMIZER_FILE, framework="pt") as stored:
            steps = [stored.get_tensor(key) for key in stored.keys() if key.startswith("step.")]  # noqa: SIM118
            if not steps:
                return
            self._make_optimizer_state(torch.stack(steps).max())
            for name, parameter in self._trained():
                for kind in MOMENTS:
                    self._set_moment(parameter, kind, stored.get_tensor(f"{kind}.{name}").to(self.engine.device))

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.engine.module.state_dict(keep_vars=True).items():
            with self._gathered([value] if isinstance(value, nn.Parameter) else [], modified=False):
                yield name, value

    def _optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """As TorchFiles names it; nothing before the first step."""
        state = self._state()
        held = next((state[owner] for owner in self._owners() if owner in state and state[owner]), None)
        if held is None:
            return
        for name, parameter in self._trained():
            yield f"step.{name}", held["step"]
            for kind in MOMENTS:
                yield f"{kind}.{name}", self._moment(parameter, kind)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.engine.module.named_parameters() if parameter.requires_grad)

    def _state(self) -> Mapping[Tensor, dict[str, Tensor]]:
        optimizer = self.engine.optimizer if self.zero_stage == 0 else self.engine.optimizer.optimizer
        state: Mapping[Tensor, dict[str, Tensor]] = optimizer.state
        return state

    def _moment(self, parameter: nn.Parameter, kind: str) -> Tensor:
        moment: Tensor
        if self.zero_stage == 0:
            moment = self.engine.optimizer.state[parameter][kind]
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
            padded = functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
            safe_set_local_optimizer_state(parameter, padded.narrow(0, size * dist.get_rank(), size), kind)

    def _owners(self) -> list[Tensor]:
        """The tensors that Adam keeps state of: flat parts of the parameters under ZeRO."""
        optimizer = self.engine.optimizer
        if self.zero_stage == 0:
            return [parameter for _, parameter in self._trained()]
        flat: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self.zero_stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        return flat

    def _make_optimizer_state(self, step: Tensor) -> None:
        """State as after the first step, which an engine that never stepped does not have yet."""
        state = self._state()
        for owner in self._owners():
            for kind in MOMENTS:
                state[owner].setdefault(kind, torch.zeros_like(owner)).zero_()
            state[owner]["step"] = step.clone()
        if self.zero_stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

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
        SpecError: there is no process group, or DeepSpeed was imported for another kind of device.
    """

    config: DeepSpeedConfig
    device: torch.device
    threads: int = 1

    def __post_init__(self) -> None:
        if not dist.is_initialized():
            remedy = "Start the ranks through a launcher, or leave `kind: deepspeed` out of the profile."
            raise SpecError(explain("profile", expected="a process group", found="none", remedy=remedy))
        if get_accelerator().device_name() != self.device.type:
            remedy = f"Set the environment variable DS_ACCELERATOR={self.device.type}."
            found = get_accelerator().device_name()
            raise SpecError(explain("DeepSpeed's accelerator", expected=self.device.type, found=found, remedy=remedy))

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

    def gather(self, rows: Tensor) -> Tensor:
        """Rows (n, ...) of any dtype of all ranks, in the order of ranks; n may differ from rank to rank and be 0."""
        mine = torch.tensor([rows.shape[0]], device=rows.device)
        counts = [int(count) for count in _from_all(mine)]
        # As bytes: neither gloo nor NCCL takes every dtype.
        data = rows.contiguous().flatten().view(torch.uint8)
        size_bytes = rows.element_size() * rows.shape[1:].numel()
        padded = functional.pad(data, (0, max(counts) * size_bytes - data.numel()))
        parts = [part[: count * size_bytes] for part, count in zip(_from_all(padded), counts, strict=True)]
        return torch.cat(parts).view(rows.dtype).view(sum(counts), *rows.shape[1:])

    def start(self, module: nn.Module, config: OptimizerConfig) -> tuple[DeepSpeedEngine, DeepSpeedFiles]:
        """Adam with decoupled weight decay: torch's own, so that one process gives the same steps."""
        be_quiet()
        if self.device.type == "cpu":
            skip_compiled_operators()
        else:
            torch.cuda.set_device(self.device)
        # DeepSpeed takes its device from here.
        os.environ["LOCAL_RANK"] = str(self.device.index or 0)
        # Another linear adds gradients in another order, so what this engine computes must not depend on an earlier one's stage.
        functional.linear = TORCH_LINEAR
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


def be_quiet() -> None:
    """Drops what DeepSpeed and torch say about each other, once for every rank, and nobody who trains can do anything about."""
    logger.setLevel(WARNING)
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
    warnings.filterwarnings("ignore", r".*`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)


def _is_news(record: LogRecord) -> bool:
    # Outputs that are dataclasses: `DeepSpeedEngine.backward` sees to them.
    return "A module has unknown inputs or outputs type" not in record.getMessage()


def _from_all(values: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return parts


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
