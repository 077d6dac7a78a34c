"""Many processes with DeepSpeed: ZeRO 0-3 over torch.distributed, gloo on CPU and NCCL on GPU."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import WARNING, LogRecord
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import get_total_norm

from draf_dist.errors import SpecError, explain
from draf_dist.training.activation_checkpointing import checkpoint_activations
from draf_dist.training.adamw import AdamW
from draf_dist.training.backend import DECODE_THREADS
from draf_dist.training.bf16 import compute_in_bf16
from draf_dist.training.decay import decay_groups
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_files import DeepSpeedFiles
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.not_imported import not_compiled, not_imported
from draf_dist.training.reached import Reached

# DeepSpeed's autotuner imports MLflow wherever it is installed: a quarter of the time that a rank takes to start.
with not_imported("mlflow"):
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.utils import register_output_backward_hooks
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils import logger

# Which nobody uses here; DeepSpeed imports it to ask whether an optimizer is one, and compiles it then.
with not_compiled():
    import deepspeed.runtime.zero.muon.muon_optimizer

# ZeRO 3 leaves parameters with fewer elements whole: gathering them costs more than it saves.
WHOLE_BELOW = 100_000
# Gradient elements that are reduced at once.
LARGEST_BUCKET = 500_000_000
# No module has this number.
_AGAIN = -1
# ZeRO 3 puts its own in place of this one, for the whole process.
TORCH_LINEAR = functional.linear
# It knows torch's, of which ours is a kind.
ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)


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
class DeepSpeedRanks:
    """This process as one rank of the default process group, which whoever started it has set up.

    Raises:
        SpecError: there is no process group, or DeepSpeed was imported for another kind of device.
    """

    config: DeepSpeedConfig
    device: torch.device
    threads: int = 1
    decode_threads: int = DECODE_THREADS

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
        """Adam with decoupled weight decay: torch's own, so that one process gives the same steps.

        Raises:
            GateError: this DeepSpeed lays its state out in another way than checkpoints need.
        """
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
        if self.config.activation_checkpointing:
            checkpoint_activations(module, *([_still_gathered] if self.config.zero_stage == 3 else []))
        if self.config.precision == "bf16":
            compute_in_bf16(module, self.device)
        optimizer = AdamW(decay_groups(module, config.weight_decay), config.learning_rate, weight_decay=config.weight_decay)
        config_dict = settings(self.config, config.clip_norm, sum(p.numel() for p in module.parameters()))
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config_dict)
        files = DeepSpeedFiles(engine, self.config.zero_stage)
        files.check()
        return DeepSpeedEngine(engine, accumulation=self.config.accumulation), files


def settings(config: DeepSpeedConfig, clip_norm: float | None, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. Clipping is spelled out because it is on by default."""
    return {
        # The true batch is the loader's business: ranks may hold different numbers of rows, so there is no global size to give.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": _zero_settings(config, num_parameters),
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own Adam for the CPU would be compiled first, and rounds otherwise than torch's.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        **config.extra.of_engine(),
    }


def _zero_settings(config: DeepSpeedConfig, num_parameters: int) -> dict[str, Any]:
    # ZeRO 2 allocates a bucket at every backward, 2 GB by default, and deterministic torch fills what it allocates.
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": min(num_parameters, LARGEST_BUCKET)}
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = WHOLE_BELOW
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "optimizer_and_parameters":
        zero["offload_param"] = {"device": "cpu"}
    return zero | config.extra.of_zero()


@contextmanager
def _still_gathered(block: nn.Module) -> Iterator[None]:
    """Leaves the parameters of a block that is computed again as gathered as they were.

    ZeRO 3 gives them back after every forward, but here backward has gathered some already and is about to use them.
    """
    in_use = [parameter for parameter in block.parameters() if parameter.ds_status is ZeroParamStatus.AVAILABLE]  # type: ignore[attr-defined]
    before = [set(parameter.ds_active_sub_modules) for parameter in in_use]  # type: ignore[attr-defined]
    for parameter in in_use:
        # They are given back once no module uses them; this stands for one that does.
        parameter.ds_active_sub_modules.add(_AGAIN)  # type: ignore[attr-defined]
    yield
    for parameter, users in zip(in_use, before, strict=True):
        parameter.ds_active_sub_modules = users  # type: ignore[attr-defined]


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
