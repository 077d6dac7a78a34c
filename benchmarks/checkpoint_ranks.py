"""The ranks of the checkpoint benchmark: our saving and Ray's in the same processes, on the same DeepSpeed engines."""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from checkpoint_report import ARMS, Measured
from ray import train
from ray.train import CheckpointConsistencyMode, CheckpointUploadMode
from rich.console import Console
from torch import nn

from draf_dist.data.loader_stats import LoaderStats
from draf_dist.storage import Store, open_store
from draf_dist.training.books import Books, NoBooks, OpenBooks
from draf_dist.training.checkpoint import Checkpoints
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.journal import Journal
from draf_dist.training.ledger import FILE, Consumed, Ledger, Supplied
from draf_dist.training.loop import StepReport
from draf_dist.training.progress import ProgressLine
from draf_dist.training.run_folder import Fence
from draf_dist.training.saving import Committer, Saver, SaveReport
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import OrderState, RunState
from draf_dist.training.tracking import Tracker
from draf_dist.training.watch.last_step import Progress

LAYERS = 20
# A step of the length of a small model's, as much work every time; and what it has to write down between two checkpoints.
STEP_SIDE, STEPS_BEFORE, STEPS_OF_INTERVAL = 700, 20, 200
TERMS = dict.fromkeys(("fused", "unimodal", "detector"), 0.5)


@dataclass(frozen=True)
class Plan:
    """What to measure. url: a bucket; folder: of this machine, for what DeepSpeed writes before Ray sends it."""

    url: str
    folder: str
    megabytes: tuple[int, ...]
    rounds: int
    arms: tuple[str, ...] = ARMS


@dataclass(frozen=True)
class Saved:
    """A checkpoint on its way. stopped_s: training stood still; files_s: of that, until the state was a copy, in memory or on disk.

    is_durable: whether this rank has nothing left to do for it. parts: seconds of (upload, commit), once it is durable.
    """

    stopped_s: float
    files_s: float
    is_durable: Callable[[], bool]
    parts: Callable[[], tuple[float, float]]


def measure(plan: Plan) -> list[Measured]:
    """What every rank does: all sizes and arms once without measuring, then rounds, each beginning with another one."""
    torch.set_num_threads(1)
    found: list[Measured] = []
    with ExitStack() as stack:
        states = [State(size, plan, stack) for size in plan.megabytes]
        cells = [(state, arm) for state in states for arm in plan.arms]
        for number in range(plan.rounds + 1):
            first = number % len(cells)
            measured = [state.measure(number, arm) for state, arm in cells[first:] + cells[:first]]
            # The first time gets memory, opens connections, makes folders.
            found += measured if number else []
    return found


class State:
    """Parameters and Adam's moments of one size, in f32, sharded over the ranks by ZeRO 1; with all that a run has beside them."""

    def __init__(self, megabytes: int, plan: Plan, stack: ExitStack) -> None:
        self.megabytes, self._folder, self.step = megabytes, plan.folder, 0
        side = int((megabytes * 1e6 / (3 * 4 * LAYERS)) ** 0.5)
        module = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(LAYERS)))
        self._input = torch.ones(1, side)
        backend = DeepSpeedRanks(DeepSpeedConfig(), torch.device("cpu"))
        self.engine, self.files = backend.start(module, OptimizerConfig())
        store = open_store(f"{plan.url}/ours-{megabytes}")
        self.checkpoints = Checkpoints(store, keep=1)
        fence = Fence.take(store) if backend.rank == 0 else None
        committer = None if fence is None else Committer(self.checkpoints, fence.attempt, backend.world)
        self.books: Books = NoBooks() if fence is None else open_books(store, fence, backend, stack)
        self.saver = stack.enter_context(Saver(self.checkpoints, self.files, backend.rank, committer))

    def measure(self, number: int, arm: str) -> Measured:
        """One checkpoint with steps going on, and its restoration.

        Raises:
            RuntimeError: what was restored is not what was saved.
        """
        self.change()
        self.write_down()
        wanted = self.digest()
        usual_s = statistics.median(step_s() for _ in range(STEPS_BEFORE))
        began = time.perf_counter()
        saved = self.save_ours() if arm == "ours" else self.save_with_ray(arm)
        taken: list[float] = []
        while not all_ranks(saved.is_durable()):
            taken.append(step_s())
        durable_s = time.perf_counter() - began
        self.change()
        restore_s = self.restore_ours() if arm == "ours" else self.restore_with_ray()
        if self.digest() != wanted:
            raise RuntimeError(f"{arm}, {self.megabytes} MB: what was restored is not what was saved")
        slowed_s = max(sum(taken) - usual_s * len(taken), 0.0)
        seconds = (saved.stopped_s, saved.files_s, slowed_s, durable_s, *saved.parts(), restore_s, usual_s)
        return Measured(number, arm, self.megabytes, *seconds, len(taken))

    def change(self) -> None:
        """A step that changes every number of the state."""
        self.engine.backward(self.engine.module(self._input).sum())
        self.engine.step(1e-3)
        self.step += 1

    def write_down(self) -> None:
        """What a run writes into metrics.jsonl and TensorBoard from checkpoint to checkpoint."""
        uids = torch.zeros(64, dtype=torch.int64)
        for _ in range(STEPS_OF_INTERVAL):
            self.books.step(StepReport(self.step, 0.5, TERMS, 1e-3, 1.0, 64, uids, uids, 0.0, 0.0), LoaderStats())

    def digest(self) -> float:
        """A number that changes with any parameter."""
        return sum(float(value.detach().double().sum()) for value in self.engine.module.parameters())

    def save_ours(self) -> Saved:
        """As a run does: a line in the books and the copy; in a thread the books are made durable, and then the checkpoint."""
        began = time.perf_counter()
        make_durable = self.books.commit(self.step, Consumed({}, {}), Supplied(LoaderStats(), LoaderStats()))
        entered = time.perf_counter()
        order = OrderState(release="none", seed=0, groups=1, open_samples=1, batch_size=1, step=self.step)
        stopping = EarlyStopping(patience=1)
        state = RunState(order=order, stopping=stopping, job_sha256="0" * 64, attempt=1, world=dist.get_world_size())
        self.saver.save(state, make_durable)
        ended = time.perf_counter()
        reports: list[SaveReport] = []

        def is_durable() -> bool:
            reports.extend(self.saver.settled())
            return bool(reports)

        return Saved(ended - began, ended - entered, is_durable, lambda: (reports[0].upload_s, reports[0].commit_s))

    def save_with_ray(self, arm: str) -> Saved:
        """As Ray's guide for DeepSpeed says: every rank's files into a folder, and the folder to train.report."""
        mode = CheckpointUploadMode.ASYNC if arm == "ray-async" else CheckpointUploadMode.SYNC
        began = time.perf_counter()
        folder = tempfile.mkdtemp(dir=self._folder)
        self.files.engine.save_checkpoint(folder)
        written = time.perf_counter()
        train.report(
            {"step": self.step},
            checkpoint=train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=mode,
            delete_local_checkpoint_after_upload=True,
        )
        reported = time.perf_counter()
        committed = Committed()
        if mode is CheckpointUploadMode.SYNC:
            parts: Callable[[], tuple[float, float]] = lambda: (reported - written, committed.at - reported)  # noqa: E731
        else:
            parts = lambda: (committed.at - written, 0.0)  # noqa: E731
        return Saved(reported - began, written - began, committed.is_there, parts)

    def restore_ours(self) -> float:
        """Every rank reads, verifies and loads."""
        began = together()
        self.files.load(self.checkpoints.at(self.step - 1).tensors)
        return together() - began

    def restore_with_ray(self) -> float:
        """Ray fetches the folder once for all ranks of a node."""
        began = together()
        checkpoint = train.get_checkpoint()
        assert checkpoint is not None
        with checkpoint.as_directory() as folder:
            self.files.engine.load_checkpoint(folder)
            restore_s = together() - began
        # DeepSpeed forgets where a parameter's moments are when it loads, and finds them once only: ours reads them again later on.
        self.files.engine.optimizer._hp_optimizer_states_linked = False
        self.files.engine.optimizer._lazy_init_hp_params_optimizer_state()
        return restore_s


class Committed:
    """Asks Ray in a thread of its own whether what was reported is durable: the question is answered when it is."""

    def __init__(self) -> None:
        self.at = 0.0
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def is_there(self) -> bool:
        """Without waiting."""
        return not self._thread.is_alive()

    def _wait(self) -> None:
        if dist.get_rank() == 0:
            train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        self.at = time.perf_counter()


def open_books(store: Store, fence: Fence, backend: DeepSpeedRanks, stack: ExitStack) -> Books:
    """Those that the first rank of a run has."""
    journal = Journal(store, FILE)
    stack.callback(journal.close)
    ledger = Ledger(journal, fence.attempt.number, 0, backend.world, backend.threads, backend.decode_threads, time.perf_counter())
    ledger.open(None)
    tracker = stack.enter_context(Tracker(store, 0))
    line = stack.enter_context(ProgressLine(Console(quiet=True), num_steps=10**6, steps_per_epoch=10**6, start=0))
    return OpenBooks(fence, ledger, tracker, line, stack.enter_context(Progress(store, fence.attempt.number)))


def step_s() -> float:
    """Seconds of a step of some other training: every rank computes, and they wait for one another."""
    began = time.perf_counter()
    rows = torch.ones(STEP_SIDE, STEP_SIDE)
    for _ in range(2):
        rows = (rows @ rows).tanh()
    dist.all_reduce(rows[0])
    return time.perf_counter() - began


def all_ranks(holds: bool) -> bool:
    """Whether it holds on every rank."""
    found = torch.tensor(float(holds))
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return bool(found)


def together() -> float:
    """The time at which all ranks are here."""
    dist.barrier()
    return time.perf_counter()


def of_plan(plan: Plan) -> Callable[[], list[Measured]]:
    """What Ray Train is given."""
    return partial(measure, plan)
