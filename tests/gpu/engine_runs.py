"""Short training runs of one rank on one device, by every engine: a process of its own, because DeepSpeed knows one kind of device.

    python tests/gpu/engine_runs.py cpu|cuda OUT

Leaves OUT/found.json: for every model, precision and engine the losses of five steps, the same for runs that were continued from
step 3, and where tensors were found. Beside it, from plain torch on the CPU in fp32, what all are measured against.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from torch import Tensor, nn

from draf_dist.models.build import build_model
from draf_dist.models.encoders import Image2dConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.objectives.pretrain import build_network
from draf_dist.objectives.pretrain_simclr import SimclrConfig
from draf_dist.schema.batch import Batch
from draf_dist.training.backend import Backend
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.fragments import HostCopy, WholeTensors
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.loop import CoupledObjective, Objective, StepRules, train_steps
from draf_dist.training.repeatable import repeatable
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import TrainState
from draf_dist.training.torch_engine import OneProcess

STEPS, SAVED, ROWS = 5, 3, 8
LEARNING_RATE = 3e-3
STAGES = (1, 2, 3)
# Large enough to be cut by ZeRO 3: parameters below are kept whole otherwise.
WHOLE_BELOW = 0
CPU = torch.device("cpu")
SIMCLR = SimclrConfig(modality="cxr")
MODELS = ("draf", "mean", "simclr")
# One of each kind of step: terms that are sums over rows, and terms that look at all rows.
CONTINUED = ("draf", "simclr")


def new_model(kind: str) -> nn.Module:
    """The same parameters at every call."""
    if kind == "simclr":
        return build_network(SIMCLR, small_schema(), Image2dConfig(widths=(4, 8), groups=2), 8, seed=1)
    config = DrafConfig if kind == "draf" else MeanConfig
    return build_model(config(width=8, encoders=SMALL_ENCODERS), small_schema(), seed=1)


def objective_of(kind: str) -> Objective | CoupledObjective:
    return SIMCLR.build(seed=1) if kind == "simclr" else FusionObjectiveConfig().build()


@cache
def batch_of(step: int) -> Batch:
    batch = small_batch(small_schema(), ROWS, seed=step)
    return replace(batch, uid=batch.uid + ROWS * step, site=torch.arange(ROWS) % 2)


def rules(backend: Backend, kind: str) -> StepRules:
    passes = 1 if kind == "simclr" else 2
    return StepRules(
        prepare=lambda batch: batch.to(backend.device),
        keys=lambda batch: pass_keys(batch, passes),
        learning_rate=lambda step: LEARNING_RATE,
        reduce=backend.reduce,
        accumulation=backend.accumulation,
    )


def engines(device: torch.device) -> Iterator[tuple[str, Backend]]:
    """By name: plain torch, and DeepSpeed with every stage in both precisions; once with two micro-batches."""
    yield "torch", OneProcess(device=device)
    for stage in STAGES:
        yield f"zero{stage}", DeepSpeedRanks(DeepSpeedConfig(zero_stage=stage), device)
        yield f"zero{stage} bf16", DeepSpeedRanks(DeepSpeedConfig(zero_stage=stage, precision="bf16"), device)
    yield "zero2 in two parts", DeepSpeedRanks(DeepSpeedConfig(zero_stage=2, accumulation=2), device)


def run(kind: str, backend: Backend, start: bytes | None = None) -> tuple[list[float], bytes, set[str]]:
    """Losses of the steps, the state after SAVED, and the devices of parameters, activations, moments and reports."""
    engine, files = backend.start(new_model(kind), OptimizerConfig(learning_rate=LEARNING_RATE))
    state = TrainState(0, EarlyStopping(patience=1))
    if start is not None:
        files.load(WholeTensors(iter([start]), "the run that stopped"))
        state.step = SAVED
    losses, saved, homes = [], start or b"", {p.device.type for p in engine.module.parameters()}
    with ExitStack() as stack:
        for module in engine.module.modules():
            stack.callback(module.register_forward_hook(note_devices(homes)).remove)
        todo = ((step, batch_of(step)) for step in range(state.step, STEPS))
        for report in train_steps(state, engine, todo, objective_of(kind), rules(backend, kind)):
            assert report.uids.device == CPU
            losses.append(report.loss)
            if report.step == SAVED:
                fragments = files.fragments()
                # Adam's step counters stay on the host, whatever the device.
                homes |= {each.values.device.type for each in fragments if each.kind != "step"}
                saved = bytes(HostCopy().take(fragments))
    return losses, saved, homes


def note_devices(homes: set[str]) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        homes.update(tensor.device.type for tensor in tensors_in(output))

    return note


def tensors_in(value: object) -> Iterator[Tensor]:
    """Of an output: a tensor, or a dataclass, tuple or dict of such."""
    if isinstance(value, Tensor):
        yield value
    parts = vars(value).values() if hasattr(value, "__dict__") else value.values() if isinstance(value, dict) else value
    if not isinstance(value, Tensor) and isinstance(parts, list | tuple | type({}.values())):
        for part in parts:
            yield from tensors_in(part)


def runs_on(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {}
    oracle = {}
    for kind in MODELS:
        with repeatable(1, CPU):
            losses, saved, _ = run(kind, OneProcess())
        oracle[kind] = saved
        found[f"{kind} oracle"] = {"losses": losses}
    with repeatable(1, device):
        for kind in MODELS:
            for name, backend in engines(device):
                losses, saved, homes = run(kind, backend)
                found[f"{kind} {name}"] = {"losses": losses, "homes": sorted(homes)}
                if kind in CONTINUED:
                    found[f"{kind} {name}"]["continued"], _, _ = run(kind, backend, saved)
        for name, backend in engines(device):
            found[f"draf {name}"]["from_cpu"], _, _ = run("draf", backend, oracle["draf"])
    return found


def main(device: torch.device, out: Path) -> None:
    from draf_dist.training import deepspeed_engine

    deepspeed_engine.WHOLE_BELOW = WHOLE_BELOW
    # ZeRO 3 collects garbage at every start, and would look at all that was imported each time: a quarter of the time of all runs.
    gc.freeze()
    # fp32 is to be fp32: convolutions of a GPU would take TF32 otherwise.
    torch.backends.cudnn.allow_tf32 = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{out / 'group'}", rank=0, world_size=1)
    try:
        (out / "found.json").write_text(json.dumps(runs_on(device)))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(torch.device("cuda", 0) if sys.argv[1] == "cuda" else CPU, Path(sys.argv[2]))
