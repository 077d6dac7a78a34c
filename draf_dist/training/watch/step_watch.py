"""Everything that watches over the steps of one rank, in one place: what `run` holds while it trains."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType

import torch
from rich.console import Console
from torch import Tensor

from draf_dist.errors import DrafError
from draf_dist.schema.batch import Batch
from draf_dist.storage import Store
from draf_dist.training.backend import Backend
from draf_dist.training.books import Books
from draf_dist.training.loop import StepReport, StepRules
from draf_dist.training.run_folder import RunFolder
from draf_dist.training.watch.board import GroupBoard, OwnBoard
from draf_dist.training.watch.flight import FlightRecorder, recover, ring_folder
from draf_dist.training.watch.health import BadStep, Health, RollBack
from draf_dist.training.watch.stragglers import Stragglers
from draf_dist.training.watch.watchdog import Hang, HungError, Watchdog


@contextmanager
def watched(
    folder: RunFolder,
    backend: Backend,
    books: Books,
    console: Console,
    *,
    attempt: int,
    start: int,
    num_rows: int,
    last_save: Callable[[int], int],
) -> Iterator["StepWatch"]:
    """The watch over the steps of an attempt that had done `start` when it began. Every rank enters it, with the books open.

    attempt: its number; num_rows: of a batch of this rank; last_save: see Health.

    Raises:
        RollBack: a step was bad, and what is skipped because of it is recorded. All ranks get there alike.
        HungError: ranks did not arrive, and a collective failed because of it.
    """
    rule = folder.job.on_bad_loss
    metrics = [] if rule.exploding is None else folder.metrics()
    health = Health.at(rule, folder.ledger(), metrics, start, last_save)
    recording = Recording(folder.store, backend, console, attempt, num_rows)
    try:
        with StepWatch(backend, books, health, recording, attempt, start) as watch:
            yield watch
    except BadStep as bad:
        skipped = health.skip(bad)
        books.skipped(skipped)
        recording.say(f"warning: {bad}: back to the checkpoint before; the updates of steps {skipped.name} are skipped from now on")
        raise RollBack from bad


class Recording:
    """The flight recorder of a rank, and what it says on the terminal."""

    def __init__(self, store: Store, backend: Backend, console: Console, attempt: int, num_rows: int) -> None:
        self._console = console
        for line in recover(store):
            self.say(line)
        self.flight = FlightRecorder(store, attempt, backend.rank, backend.world, num_rows)
        if self.flight.missing is not None:
            self.say(f"warning: rank {backend.rank}: {self.flight.missing} ({ring_folder(store)})")

    def say(self, line: str) -> None:
        """One line on the terminal."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def trouble(self, what: str) -> None:
        """Writes everything to the run folder."""
        failed = self.flight.trouble(what)
        if failed is not None:
            self.say(f"warning: nothing written to {self.flight.path}: {failed}")


class StepWatch:
    """Of one rank in one attempt, while entered. Whatever ends it by an error is written to the run folder first."""

    def __init__(self, backend: Backend, books: Books, health: Health, recording: Recording, attempt: int, start: int) -> None:
        self.health = health
        self._books, self._recording, self._step = books, recording, start
        board = OwnBoard() if backend.world == 1 else GroupBoard.open(str(attempt))
        self._dog = Watchdog(backend.rank, backend.world, board, self._heard)
        self._stragglers = Stragglers(backend.rank, backend.world, backend.reduce, backend.device)
        self._hang: Hang | None = None
        self._handed = self._forward_s = 0.0
        self._entered = ExitStack()

    def __enter__(self) -> "StepWatch":
        self._entered.enter_context(self._dog)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._entered.close()
        hang = self._hang
        # Whoever only stops asking for steps has met no trouble.
        if error is not None and not isinstance(error, GeneratorExit):
            # An error's own text may quote data, unless it is one of ours.
            self._recording.trouble(str(error) if isinstance(error, DrafError | BadStep) else type(error).__name__)
        self._recording.flight.close()
        if hang is not None and hang.step == self._step and isinstance(error, RuntimeError):
            raise HungError(hang.message(self._recording.flight.path)) from error

    def batches(self, batches: Iterable[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """The same batches; who asks for them is watched from then on."""
        source = iter(batches)
        while True:
            self._dog.at(self._step + 1, "data")
            found = next(source, None)
            if found is None:
                self._dog.at(self._step, "between")
                return
            # As metrics.jsonl counts: the step that this batch will be.
            self._step = found[0] + 1
            self._recording.flight.begin(self._step, found[1].uid)
            self._handed, self._forward_s = time.perf_counter(), -1.0
            self._dog.at(self._step, "step")
            yield found

    def rules(self, rules: StepRules) -> StepRules:
        """The same rules, with the first collective of every step timed."""
        return replace(rules, reduce=self._timed(rules.reduce))

    def after(self, report: StepReport) -> None:
        """A step was done, and is in the books. A collective every few steps."""
        self._dog.at(report.step, "between")
        self._recording.flight.end(report)
        if report.skipped is not None:
            self._recording.say(f"warning: the update of step {report.step} is skipped: {report.skipped.why}")
        forward_s = max(self._forward_s, 0.0)
        for slow in self._stragglers.add(report.wait_s, forward_s, report.wait_s + report.compute_s):
            self._books.slow(slow, report.step)
            self._recording.say(f"warning: step {report.step}: {slow.message}")

    def _timed(self, reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def timed(values: Tensor) -> Tensor:
            if self._forward_s < 0:
                if values.is_cuda:
                    # Its sum is read at once anyway; without this only the launch of the kernels would be measured.
                    torch.cuda.synchronize(values.device)
                self._forward_s = time.perf_counter() - self._handed
            return reduce(values)

        return timed

    def _heard(self, hang: Hang) -> None:
        self._hang = hang
        message = hang.message(self._recording.flight.path)
        self._recording.say(f"warning: {message}")
        self._recording.trouble(message)
