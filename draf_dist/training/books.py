"""What is written about a run while it goes on; the first rank writes, the others hold the same books in vain."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import Protocol

from rich.console import Console

from draf_dist.data.loader_stats import LoaderStats
from draf_dist.errors import DrafError, GateError
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
from draf_dist.training.state import TrainState
from draf_dist.training.tracking import Tracker
from draf_dist.training.watch.health import RollBack, Skipped
from draf_dist.training.watch.last_step import Progress, last_step
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

    def started(self) -> None:
        """The attempt is ready for its first batch."""
        ...

    def check(self) -> None:
        """Raises GateError if a later attempt has taken the run over."""
        ...

    def commit(self, step: int, consumed: Consumed, supplied: Supplied) -> Callable[[], None]:
        """Enters what was consumed, and what the loaders did, since the last commit.

        What it returns makes everything entered so far durable: to be called, by any thread, before anything of the checkpoint is
        written. It raises GateError if a later attempt has taken the run over.
        """
        ...

    def saved(self, report: SaveReport) -> None:
        """Enters a checkpoint that has become durable."""
        ...

    def close(self, outcome: Outcome, stopping: EarlyStopping, reason: str | None = None) -> None:
        """Says how the attempt ended; reason: who asked for it."""
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

    def started(self) -> None:
        """Nothing."""

    def check(self) -> None:
        """Nothing."""

    def commit(self, step: int, consumed: Consumed, supplied: Supplied) -> Callable[[], None]:
        """Nothing."""
        return self.check

    def saved(self, report: SaveReport) -> None:
        """Nothing."""

    def close(self, outcome: Outcome, stopping: EarlyStopping, reason: str | None = None) -> None:
        """Nothing."""


class OpenBooks:
    """Of the first rank."""

    def __init__(self, fence: Fence, ledger: Ledger, tracker: Tracker, line: ProgressLine, progress: Progress) -> None:
        self._fence, self._ledger, self._tracker, self._line, self._progress = fence, ledger, tracker, line, progress
        self._mark = ledger.began
        self._ended = False

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1."""
        return self._ledger.attempt

    def step(self, report: StepReport, supply: LoaderStats) -> None:
        """Enters one step."""
        self._ledger.step(report.step, report.wait_s, report.compute_s)
        if report.skipped is None:
            self._tracker.step(report, supply)
            self._line.step(report)
        else:
            self.skipped(report.skipped)
        self._progress.at(report.step, self._ledger.at_stake_s)
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
        self._line.epoch(epoch, loss, numbers, best=stopping.best_step == step)

    def spent(self, kind: Kind) -> None:
        """Books the wall time since the last entry."""
        now = time.perf_counter()
        self._ledger.spend(kind, now - self._mark)
        self._mark = now

    def started(self) -> None:
        """Books the time until now as that of the start."""
        self.spent(self._ledger.starting)

    def check(self) -> None:
        """Asks the fence."""
        self._fence.check()

    def commit(self, step: int, consumed: Consumed, supplied: Supplied) -> Callable[[], None]:
        """Enters it; what is returned writes metrics first, the ledger last."""
        self.spent("checkpoint")
        self._ledger.commit(step, consumed, supplied)
        return self._make_durable

    def _make_durable(self) -> None:
        self._fence.check()
        self._tracker.flush()
        self._ledger.flush()

    def saved(self, report: SaveReport) -> None:
        """Enters a checkpoint that has become durable."""
        self._ledger.saved(report)

    def close(self, outcome: Outcome, stopping: EarlyStopping, reason: str | None = None) -> None:
        """The last line of the ledger, and what it says on the terminal."""
        self._ended = True
        self._line.end(self._ledger.close(outcome, reason, best_loss=stopping.best_loss, best_step=stopping.best_step))

    def broke(self, error: BaseException) -> None:
        """Says that the attempt ended by an error, if it can; the error's own text may quote data."""
        if self._ended or isinstance(error, GateError):
            return
        # What stops the run may be what stops this line too: then the next attempt says what is known.
        with suppress(DrafError, OSError):
            self._fence.check()
            self._line.end(self._ledger.close(*_how(error), foreseen=isinstance(error, DrafError | RollBack)))


def _how(error: BaseException) -> tuple[Outcome, str]:
    if isinstance(error, GeneratorExit):
        return "interrupted", "its caller went on without it"
    return ("rolled_back", "bad loss") if isinstance(error, RollBack) else ("failed", type(error).__name__)


@contextmanager
def open_books(
    folder: RunFolder, stage: Stage, backend: Backend, state: TrainState, fence: Fence | None, console: Console, began: float
) -> Iterator[Books]:
    """The books of this rank, from where the run stands on; without a fence it writes nothing. began: by time.perf_counter()."""
    start = state.step
    if fence is None:
        yield NoBooks()
        return
    with ExitStack() as stack:
        journal = Journal(folder.store, LEDGER)
        stack.callback(journal.close)
        ledger = Ledger(journal, fence.attempt.number, start, backend.world, backend.threads, backend.decode_threads, began)
        # Before the tracker takes out what the attempt before wrote past its checkpoint.
        ledger.open(last_step(folder.store, journal.lines))
        tracker = stack.enter_context(Tracker(folder.store, start, state.due))
        epoch_steps = stage.plan.order.steps_per_epoch
        line = ProgressLine(console, num_steps=num_steps(stage), steps_per_epoch=epoch_steps, start=start)
        stack.enter_context(line)
        books = OpenBooks(fence, ledger, tracker, line, stack.enter_context(Progress(folder.store, fence.attempt.number)))
        try:
            yield books
        except BaseException as error:
            books.broke(error)
            raise
