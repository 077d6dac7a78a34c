"""Seconds of a checkpoint: what training waits for, and what happens behind it, for states of 10, 100 and 500 MB.

    python benchmarks/checkpoint.py [--rounds 5] [--megabytes 10 100 500] [--folder DIR] [--json FILE]

One process on a real S3 server on this machine, and on its disk. A state is parameters and both moments of Adam, in f32. Rounds are
interleaved: every size and store saves once, then all again, beginning with another. Columns, medians over rounds with the worst in
brackets:
  snapshot  the copy into host memory: training stands still (the first one of a run, which also gets the memory, is `first`)
  slowed    how much longer the steps took that were made until the checkpoint was durable, together: training shares the cores
            with hashing, sending and, here, with the server
  upload    sha256 of the state, and writing it; commit: from then until the manifest is there and what it replaces gone
  restore   reading, verifying and loading it
  stall     snapshot + slowed as a share of an interval of 60 s
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from draf_dist.launch.local_s3 import LocalS3
from draf_dist.storage import open_store
from draf_dist.training.checkpoint import Checkpoints
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.run_folder import Fence
from draf_dist.training.saving import Committer, Saver
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import OrderState, RunState
from draf_dist.training.torch_engine import OneProcess

LAYERS = 20
INTERVAL_S = 60.0
# A step of the length of a small model's, as much work every time.
STEP_SIDE, STEPS_BEFORE = 700, 20


@dataclass(frozen=True)
class Measured:
    """Seconds of one checkpoint; size_bytes: of its files; steps: made until it was durable."""

    size_bytes: int
    snapshot_s: float
    slowed_s: float
    upload_s: float
    commit_s: float
    restore_s: float
    steps: int


@dataclass
class Arm:
    """One size in one store, with all that a run has."""

    store_name: str
    megabytes: int
    url: str
    step: int = 0
    first_snapshot_s: float = 0.0
    rounds: list[Measured] = field(default_factory=list)

    def __post_init__(self) -> None:
        side = int((self.megabytes * 1e6 / (3 * 4 * LAYERS)) ** 0.5)
        self.module = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(LAYERS)))
        backend = OneProcess()
        self.engine, self.files = backend.start(self.module, OptimizerConfig())
        self.train()
        store = open_store(self.url)
        fence = Fence.take(store)
        self.attempt = fence.attempt.number
        self.checkpoints = Checkpoints(store, keep=1)
        self.saver = Saver(self.checkpoints, self.files, 0, Committer(self.checkpoints, fence.attempt, 1))

    def train(self) -> None:
        """Changes every number of the state."""
        for parameter in self.module.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3 * (self.step + 1))
        self.engine.step(1e-3)
        self.step += 1

    def save(self) -> None:
        """Saves and forgets: the first time, which gets the memory."""
        self.saver.save(self.state())
        self.saver.wait()
        (report,) = self.saver.settled()
        self.first_snapshot_s = report.snapshot_s

    def measure(self) -> None:
        """One checkpoint with steps going on, and its restoration."""
        self.train()
        usual_s = statistics.median(step_s() for _ in range(STEPS_BEFORE))
        self.saver.save(self.state())
        taken: list[float] = []
        while not (reports := self.saver.settled()):
            taken.append(step_s())
        (report,) = reports
        slowed_s = max(sum(taken) - usual_s * len(taken), 0.0)
        began = time.perf_counter()
        self.files.load(self.checkpoints.at(self.step).tensors)
        restore_s = time.perf_counter() - began
        seconds = (report.snapshot_s, slowed_s, report.upload_s, report.commit_s, restore_s)
        self.rounds.append(Measured(report.size_bytes, *seconds, len(taken)))

    def state(self) -> RunState:
        """What stands in state.json."""
        order = OrderState(release="none", seed=0, groups=1, open_samples=1, batch_size=1, step=self.step)
        stopping = EarlyStopping(patience=1)
        return RunState(order=order, stopping=stopping, job_sha256="0" * 64, attempt=self.attempt, world=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 500])
    parser.add_argument("--folder", type=Path, help="where the server and the local store lie")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name, LocalS3(Path(name) / "s3") as server:
        os.environ.update(server.environment)
        places = {"s3": server.create_bucket("checkpoints"), "local": str(Path(name) / "local")}
        arms = [Arm(store, size, f"{url}/{size}") for size in options.megabytes for store, url in places.items()]
        for arm in arms:
            arm.save()
        for number in range(options.rounds):
            for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
                arm.measure()
    show(arms)
    if options.json:
        options.json.write_text(json.dumps(written(arms, options.rounds), indent=1))


def step_s() -> float:
    """Seconds of a step of some other training in this process."""
    began = time.perf_counter()
    rows: Tensor = torch.ones(STEP_SIDE, STEP_SIDE)
    for _ in range(2):
        rows = (rows @ rows).tanh()
    return time.perf_counter() - began


def written(arms: list[Arm], rounds: int) -> dict[str, object]:
    """What --json holds."""
    found = [
        {
            "store": arm.store_name,
            "megabytes": arm.megabytes,
            "first_snapshot_s": arm.first_snapshot_s,
            "rounds": [asdict(each) for each in arm.rounds],
        }
        for arm in arms
    ]
    return {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "rounds": rounds, "arms": found}


def show(arms: list[Arm]) -> None:
    """The table."""
    table = Table("state", "store", "first s", "snapshot s", "slowed s", "upload s", "commit s", "restore s", "stall of 60 s")
    for arm in arms:
        names = ("snapshot_s", "slowed_s", "upload_s", "commit_s", "restore_s")
        cells = [both([getattr(each, name) for each in arm.rounds]) for name in names]
        stall = statistics.median((each.snapshot_s + each.slowed_s) / INTERVAL_S for each in arm.rounds)
        table.add_row(f"{arm.megabytes} MB", arm.store_name, f"{arm.first_snapshot_s:.3f}", *cells, f"{100 * stall:.2f} %")
    Console(width=150).print(table)


def both(seconds: list[float]) -> str:
    """The median and the worst."""
    return f"{statistics.median(seconds):.3f} ({max(seconds):.3f})"


if __name__ == "__main__":
    main()
