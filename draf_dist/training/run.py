"""A run: begun once, continued by as many attempts as it takes; stopped at any moment, the same command goes on."""

import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console

from draf_dist.data.release import open_release
from draf_dist.errors import DataError, InterruptedRunError, SpecError, explain
from draf_dist.training.backend import Backend, EngineFiles
from draf_dist.training.books import Books, open_books
from draf_dist.training.checkpoint import folder_of
from draf_dist.training.consumption import Consumption
from draf_dist.training.engine import Engine
from draf_dist.training.interrupt import Interrupt
from draf_dist.training.jobs import AnyJob
from draf_dist.training.journal import Line
from draf_dist.training.loop import StepReport, train_steps
from draf_dist.training.pin import pin
from draf_dist.training.repeatable import repeatable
from draf_dist.training.run_folder import MODEL, Fence, RunFolder, Start, as_pinned_there, enter_run, open_run
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.stage import Stage, num_steps
from draf_dist.training.stages import build_stage
from draf_dist.training.state import OrderState, RunState, TrainState
from draf_dist.training.supply import Supply
from draf_dist.training.torch_engine import MODEL_FILE, OneProcess

RUNS = "runs"
ONE_PROCESS = OneProcess()


class StopRequest(Protocol):
    """Whoever may ask a run to stop after the step in hand."""

    @property
    def requested(self) -> str | None:
        """Why it is to stop, None while it is not. Asked after every step."""
        ...


@dataclass(frozen=True)
class RunResult:
    """How a run ended. best_loss: the lowest of validation, in the unit of the job's score; best_step: when; steps: all done."""

    url: str
    score: str
    best_loss: float
    best_step: int
    steps: int
    finished: bool


@dataclass(frozen=True)
class EpochReport:
    """An epoch whose checkpoint is durable. epoch: epochs done; step: steps done; numbers: those of its validation."""

    epoch: int
    step: int
    numbers: dict[str, float]


@dataclass(frozen=True)
class Attempt:
    """What one rank works with in one attempt at a run."""

    folder: RunFolder
    stage: Stage
    backend: Backend
    engine: Engine
    files: EngineFiles
    state: TrainState
    books: Books
    stop: StopRequest
    consumed: Consumption
    console: Console


def train(
    job: AnyJob,
    out: str | None = None,
    *,
    fresh: bool = False,
    resume: bool = False,
    console: Console | None = None,
    backend: Backend = ONE_PROCESS,
) -> RunResult:
    """Begins or continues a run, and carries it to its end, in this process. Arguments and errors: see begin and attempt."""
    folder = begin(job, out, fresh=fresh, resume=resume)
    with Interrupt() as interrupt:
        return attempt(folder.url, backend, console or Console(stderr=True), interrupt)


def begin(job: AnyJob, out: str | None = None, *, fresh: bool = False, resume: bool = False) -> RunFolder:
    """Pins what the job reads, and makes or finds its run folder. Called once, however many processes then train.

    out: URL of the run folder, runs/<job>-<8 hex> if None. fresh: removes it first. resume: it must exist.

    Raises:
        SpecError: no such release; the folder holds another run; both fresh and resume; resume and no run.
    """
    start = _start(fresh=fresh, resume=resume)
    pinned = pin(job if out is None or start == "fresh" else as_pinned_there(job, out))
    return enter_run(out or f"{RUNS}/{pinned.run_name}", pinned, start)


def attempt(url: str, backend: Backend, console: Console, stop: StopRequest) -> RunResult:
    """Carries a run that exists on from its newest good checkpoint, and exports the best model at its end.

    The end is the job's last epoch, or when validation has stopped getting better. Every rank calls it; the first one writes.

    Raises:
        SpecError: more ranks than rows in a batch; no such release.
        InterruptedRunError: it was asked to stop; a checkpoint was written.
        DataError: a broken shard; checkpoints that are all broken.
        GateError: a later attempt has taken the run over.
    """
    epochs = attempt_by_epochs(url, backend, console, stop)
    while True:
        try:
            next(epochs)
        except StopIteration as ended:
            result: RunResult = ended.value
            return result


def attempt_by_epochs(url: str, backend: Backend, console: Console, stop: StopRequest) -> Generator[EpochReport, None, RunResult]:
    """The same, handing over after every epoch: for a caller who decides then whether it is worth while to go on.

    A caller who does not go on closes the generator; the run can be continued from there.
    """
    began = time.perf_counter()
    folder = open_run(url)
    ended = folder.end()
    if ended is not None:
        return _result(folder, ended)
    _check_fits(folder.job, backend)
    with repeatable(backend.threads, backend.device), ExitStack() as stack:
        stage = build_stage(folder.job, open_release(folder.job.release), backend)
        engine, files = backend.start(stage.model, folder.job.optimizer)
        fence = Fence.take(folder.store) if backend.rank == 0 else None
        state = _restore(folder, files, backend, console)
        books = stack.enter_context(open_books(folder, stage, backend, state.step, fence, console, began))
        books.spent("startup")
        consumed = Consumption(stage.plan, backend.rank, backend.world)
        work = Attempt(folder, stage, backend, engine, files, state, books, stop, consumed, console)
        yield from _train(work)
        return _finish(work)


def _start(*, fresh: bool, resume: bool) -> Start:
    if fresh and resume:
        raise SpecError(explain("--fresh --resume", expected="one of them", found="both", remedy="Leave one out."))
    return "fresh" if fresh else "resume" if resume else "continue"


def _check_fits(job: AnyJob, backend: Backend) -> None:
    parts = backend.world * backend.accumulation
    if job.batch_size < parts:
        expected = f"at most {job.batch_size} ranks x micro-batches, one row of a batch each"
        found = f"{backend.world} x {backend.accumulation}"
        raise SpecError(explain("profile", expected=expected, found=found, remedy="Use fewer, or a larger batch_size."))


def _restore(folder: RunFolder, files: EngineFiles, backend: Backend, console: Console) -> TrainState:
    """The state of the newest good checkpoint, loaded into the engine; the beginning where there is none.

    Raises:
        DataError: no checkpoint is good, or it is one of another job.
    """
    with _newest(folder, backend, console) as found:
        if found is None:
            return TrainState(0, EarlyStopping(patience=folder.job.patience))
        stored, path = found
        if stored.job_sha256 != folder.job.sha256:
            where = folder.store.where(folder_of(stored.order.step))
            remedy = "Start anew with --fresh."
            raise DataError(explain(where, expected="a checkpoint of this job", found="another job's", remedy=remedy))
        files.load(path)
        return TrainState(stored.order.step, stored.stopping)


@contextmanager
def _newest(folder: RunFolder, backend: Backend, console: Console) -> Iterator[tuple[RunState, Path] | None]:
    """The newest good checkpoint, opened on every rank: the first one chooses, and clears away what lies past it."""

    def warn(message: str) -> None:
        console.print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True)

    checkpoints = folder.checkpoints
    if backend.rank == 0:
        with checkpoints.newest(warn) as found:
            step = 0 if found is None else found[0].order.step
            checkpoints.discard_past(step)
            _of_first(backend, [float(step)])
            yield found
        return
    (chosen,) = _of_first(backend, [0.0])
    if not chosen:
        yield None
        return
    with checkpoints.opened(int(chosen)) as path:
        yield checkpoints.state_in(path, int(chosen)), path


def _of_first(backend: Backend, values: list[float]) -> list[float]:
    """The first rank's values, on every rank."""
    mine = torch.tensor(values, dtype=torch.float64, device=backend.device)
    found: list[float] = backend.gather(mine if backend.rank == 0 else mine[:0]).tolist()
    return found


def _train(work: Attempt) -> Iterator[EpochReport]:
    """Steps, with validation after every epoch and checkpoints, until the run is over.

    Raises:
        InterruptedRunError: it was asked to stop.
    """
    stage, state, backend = work.stage, work.state, work.backend
    if _is_over(work):
        return
    supply = Supply(stage.loader(backend), work.folder.store, backend.rank, state.step, work.console)
    batches = supply.loader.batches(state.step, num_steps(stage))
    losses: list[float] = []
    with ExitStack() as stack:
        # A loader that is closed ends its threads at once.
        stack.callback(batches.close)
        for report in train_steps(state, work.engine, batches, stage.objective, stage.rules(backend)):
            work.consumed.add(report)
            work.books.step(_of_all_ranks(report, work), supply.stats())
            losses.append(report.loss)
            stopped = _asked_to_stop(work)
            epoch, within = divmod(state.step, stage.plan.order.steps_per_epoch)
            validated = _validate(work, epoch, losses) if within == 0 else None
            if within == 0 or state.step % stage.job.checkpoint.every_steps == 0 or stopped:
                _commit(work, supply)
            if validated is not None:
                losses.clear()
                yield validated
            if _is_over(work):
                return
            if stopped:
                raise _interrupted(work)


def _of_all_ranks(report: StepReport, work: Attempt) -> StepReport:
    """The report with the samples of the global batch."""
    return replace(report, samples=work.stage.plan.num_entries(report.step - 1))


def _asked_to_stop(work: Attempt) -> bool:
    """Whether any rank was: they must all do the same."""
    asked = torch.tensor([float(work.stop.requested is not None)], device=work.backend.device)
    return bool(work.backend.reduce(asked) > 0)


def _is_over(work: Attempt) -> bool:
    return work.state.step >= num_steps(work.stage) or work.state.stopping.exhausted


def _validate(work: Attempt, epoch: int, losses: list[float]) -> EpochReport:
    """Measures on validation; `losses` are those of the epoch's steps (of this attempt)."""
    state, loss = work.state, sum(losses) / len(losses)
    numbers = work.stage.validate(work.engine.module, work.backend)
    state.stopping = state.stopping.after(numbers[work.stage.job.score], state.step)
    work.books.epoch(epoch, loss, numbers, state.stopping, state.step)
    work.books.spent("validate")
    return EpochReport(epoch, state.step, numbers)


def _commit(work: Attempt, supply: Supply) -> None:
    """Makes everything so far durable: books first, the checkpoint's manifest last."""
    state, checkpoints = work.state, work.folder.checkpoints
    work.books.commit(state.step, work.consumed.settle(work.backend), supply.settle(work.backend))
    if work.backend.rank == 0:
        stored = RunState(
            order=OrderState.at(work.stage.job, work.stage.release.version, state.step),
            stopping=state.stopping,
            job_sha256=work.stage.job.sha256,
            attempt=work.books.attempt,
            world=work.backend.world,
        )
        checkpoints.commit(stored, work.files.save, guard=work.books.check)
        checkpoints.prune(state.stopping.best_step)
    else:
        with tempfile.TemporaryDirectory(prefix="draf-checkpoint-") as folder:
            work.files.save(Path(folder))
    work.books.spent("checkpoint")


def _interrupted(work: Attempt) -> InterruptedRunError:
    work.books.close("interrupted", work.state.stopping)
    found = f"{work.stop.requested or 'a signal'} after step {work.state.step} of {num_steps(work.stage)}"
    remedy = "A checkpoint was written: the same command continues."
    return InterruptedRunError(explain(work.folder.url, expected="to finish", found=found, remedy=remedy))


def _finish(work: Attempt) -> RunResult:
    """Exports the weights of the best validation; the run is finished once the ledger says so, and no rank leaves before."""
    if work.backend.rank == 0:
        _export(work)
    _of_first(work.backend, [1.0])
    ended = work.folder.end()
    assert ended is not None
    return _result(work.folder, ended)


def _export(work: Attempt) -> None:
    store, best = work.folder.store, work.state.stopping
    assert best.best_step is not None
    work.books.check()
    for name, content in _best(work, best.best_step).items():
        store.write(f"{MODEL}/{name}", content)
    work.books.spent("checkpoint")
    work.books.close("finished", best)


def _best(work: Attempt, step: int) -> dict[str, bytes]:
    try:
        with work.folder.checkpoints.opened(step) as files:
            return work.stage.export(files / MODEL_FILE)
    except DataError as error:
        # Nothing can bring them back but training again, so no later call of the same command would get further.
        remedy = "Start anew with --fresh: the same job gives the same weights."
        where = work.folder.store.where(folder_of(step))
        found = f"a broken checkpoint ({error})"
        raise DataError(explain(where, expected="the weights of the best validation", found=found, remedy=remedy)) from error


def _result(folder: RunFolder, ended: Line) -> RunResult:
    return RunResult(folder.url, folder.job.score, ended["best_loss"], ended["best_step"], ended["steps"], finished=True)
