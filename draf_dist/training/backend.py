"""Where a run computes: one process, or the ranks of a group. A matter of the profile, never of the job."""

from typing import Protocol

import torch
from torch import Tensor, nn

from draf_dist.training.engine import Engine
from draf_dist.training.fragments import Fragment, WholeTensors
from draf_dist.training.job import OptimizerConfig

# Where nobody says how many cores there are to be had.
DECODE_THREADS = 2


class EngineFiles(Protocol):
    """How parameters and optimizer state get into the files of a checkpoint and back."""

    def fragments(self) -> list[Fragment]:
        """What this rank owns, where it lies now; the ranks' fragments together are all, once. No rank waits for another."""
        ...

    def load(self, state: WholeTensors) -> None:
        """Restores what was saved by any number of ranks, bit for bit. Every rank calls it with the same state."""
        ...


class Backend(Protocol):
    """What a stage asks of the place it runs in; every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This rank in [0, world)."""
        ...

    @property
    def world(self) -> int:
        """How many ranks there are."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches and parameters live."""
        ...

    @property
    def threads(self) -> int:
        """Threads of one operator. Part of what makes a run repeatable bit for bit."""
        ...

    @property
    def decode_threads(self) -> int:
        """Threads that decode samples. How fast they come, never what comes."""
        ...

    @property
    def accumulation(self) -> int:
        """Micro-batches per step and rank: fits a batch into memory, changes no result."""
        ...

    def reduce(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Rows (n, ...) of all ranks, in the order of ranks; n may differ from rank to rank and be 0."""
        ...

    def start(self, module: nn.Module, config: OptimizerConfig) -> tuple[Engine, EngineFiles]:
        """An engine with fresh optimizer state, and the way to store it."""
        ...
