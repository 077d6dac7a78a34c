"""What is written about a run while it goes on; the first rank writes, the others hold the same books in vain."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Protocol

from rich.console import Console

from draf_dist.data.loader_stats import LoaderStats
from draf_dist.training.backend import Backend
from draf_dist.training.journal import Journal
from draf_dist.training.ledger import FILE as LEDGER
from draf_dist.training.ledger import Consumed, Kind, Ledger, Outcome, Supplied
from draf_dist.training.loop import StepReport
from draf_dist.training.progress import ProgressLine
from draf_dist.training.run_folder import Fence, RunFolder
from draf_dist.training.saving import SaveReport
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.stage import Stage, num_steps
from draf_dist.training.tracking import Tracker
from draf_dist.training.watch.health import Skipped
from draf_dist.training.watch.stragglers import SlowRank


class Books(Protocol):
    """The ledger, the metrics, the terminal, and the right to write into the run folder."""

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1."""
        ...

    def step(self, report: StepReport, supply: LoaderStats) -> None:
        """Enters one step; its samples are those of the global batch. supply: of this rank, since the attempt began."""
        ...

    def skipped(self, skipped: Skipped) -> None:
        """Enters what is skipped, at once and for every later attempt."""
        ...

    def slow(self, found: SlowRank, step: int) -> None:
        """Enters a rank that has turned out to be slow."""
        ...

    def epoch(self, epoch: int, loss: float, numbers: dict[str, float], stopping: EarlyStopping, step: int) -> None:
        """Enters one validation; epoch counts epochs done."""
        ...

    def spent(self, kind: Kind) -> None:
        """Books the wall time since the last entry."""
        ...

    def check(self) -> None:
        """Raises GateError if a later attempt has taken the run over."""
        ...

    def commit(self, step: int, consumed: Consumed, supplied: Supplied) -> None:
        """Makes everything entered so far durable; and what was consumed, and what the loaders did, since the last commit."""
        ...

    def saved(self, report: SaveReport) -> None:
        """Enters a checkpoint that has become durable."""
        ...

    def close(self, outcome: Outcome, stopping: EarlyStopping) -> None:
        """Says how the attempt ended."""
        ...


class NoBooks:
    """Of a rank that only computes."""

    attempt = 0

    def step(self, report: StepReport, supply: LoaderStats) -> None:
        """Nothing."""

    def skipped(self, skipped: Skipped) -> None:
        """Nothing."""

    def slow(self, found: SlowRank, step: int) -> None:
        """Nothing."""

    def epoch(self, epoch: int, loss: float, numbers: dict[str, float], stopping: EarlyStopping, step: int) -> None:
        """Nothing."""

    def spent(self, kind: Kind) -> None:
        """Nothing."""

    def check(self) -> None:
        """Nothing."""

    def commit(self, step: int, consumed: Consumed, supplied: Supplied) -> None:
        """Nothing."""

    def saved(self, report: SaveReport) -> None:
        """Nothing."""

    def close(self, outcome: Outcome, stopping: EarlyStopping) -> None:
        """Nothing."""


class OpenBooks:
    """Of the first rank."""

    def __init__(self, fence: Fence, ledger: Ledger, tracker: Tracker, progress: ProgressLine, began: float) -> None:
        self._fence, self._ledger, self._tracker, self._progress = fence, ledger, tracker, progress
        self._mark = began

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1."""
        return self._ledger.attempt

    def step(self, report: StepReport, supply: LoaderStats) -> None:
        """Enters one step."""
        self._ledger.spend("data_wait", report.wait_s)
        self._ledger.spend("step", report.compute_s)
        if report.skipped is None:
            self._tracker.step(report, supply)
            self._progress.step(report)
        else:
            self.skipped(report.skipped)
        self._mark = time.perf_counter()

    def skipped(self, skipped: Skipped) -> None:
        """Enters what is skipped."""
        self._fence.check()
        self._ledger.note("skipped", **asdict(skipped))

    def slow(self, found: SlowRank, step: int) -> None:
        """Enters a rank that has turned out to be slow."""
        self._ledger.note("slow", step=step, **asdict(found))

    def epoch(self, epoch: int, loss: float, numbers: dict[str, float], stopping: EarlyStopping, step: int) -> None:
        """Enters one validation."""
        self._tracker.epoch(epoch, step, numbers)
        self._progress.epoch(epoch, loss, numbers, best=stopping.best_step == step)

    def spent(self, kind: Kind) -> None:
        """Books the wall time since the last entry."""
        now = time.perf_counter()
        self._ledger.spend(kind, now - self._mark)
        self._mark = now

    def check(self) -> None:
        """Asks the fence."""
        self._fence.check()

    def commit(self, step: int, consumed: Consumed, supplied: Supplied) -> None:
        """Metrics first, the ledger last."""
        self._fence.check()
        self._tracker.flush()
        self._ledger.commit(step, consumed, supplied)

    def saved(self, report: SaveReport) -> None:
        """Enters a checkpoint that has become durable."""
        self._ledger.saved(report)

    def close(self, outcome: Outcome, stopping: EarlyStopping) -> None:
        """The last line of the ledger."""
        self._ledger.close(outcome, best_loss=stopping.best_loss, best_step=stopping.best_step)


@contextmanager
def open_books(
    folder: RunFolder, stage: Stage, backend: Backend, start: int, fence: Fence | None, console: Console, began: float
) -> Iterator[Books]:
    """The books of this rank, from step `start` on; a rank without a fence writes nothing. began: by time.perf_counter()."""
    if fence is None:
        yield NoBooks()
        return
    with ExitStack() as stack:
        journal = Journal(folder.store, LEDGER)
        stack.callback(journal.close)
        ledger = Ledger(journal, fence.attempt.number, start, backend.world, backend.threads, backend.decode_threads, began)
        ledger.open()
        tracker = stack.enter_context(Tracker(folder.store, start))
        epoch_steps = stage.plan.order.steps_per_epoch
        progress = ProgressLine(console, num_steps=num_steps(stage), steps_per_epoch=epoch_steps, start=start)
        yield OpenBooks(fence, ledger, tracker, stack.enter_context(progress), began)
