"""Several ranks on this machine, each in a process of its own, which has waited for its imports already."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from draf_dist.launch.local_s3 import HOST, free_ports

# What ranks import, and what torch and DeepSpeed import when an optimizer is made: seconds of every process that begins anew.
IMPORTED = (
    "draf_dist.training.run",
    "draf_dist.training.deepspeed_engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
)
RunRank = Callable[..., None]


def run_on_ranks(run_rank: RunRank, world: int, *arguments: Any) -> None:
    """Calls run_rank(rank, world, *arguments) in `world` processes of one gloo group; raises what one of them raised."""
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    (port,) = free_ports(1)
    mp.start_processes(_join, (world, port, dict(os.environ), run_rank, arguments), nprocs=world, start_method="forkserver")


def _join(rank: int, world: int, port: int, environment: Mapping[str, str], run_rank: RunRank, arguments: tuple[Any, ...]) -> None:
    # That of the process from which ranks are forked may be an older one.
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{HOST}:{port}", rank=rank, world_size=world)
    run_rank(rank, world, *arguments)
    dist.destroy_process_group()
