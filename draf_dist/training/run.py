"""A run: begun once, continued by as many attempts as it takes; stopped at any moment, the same command goes on."""

import math
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from rich.console import Console

from draf_dist.data.release import open_release
from draf_dist.errors import InterruptedRunError, SpecError, explain
from draf_dist.training.backend import Backend
from draf_dist.training.books import Books, open_books
from draf_dist.training.consumption import Consumption
from draf_dist.training.engine import Engine
from draf_dist.training.exporting import export_best
from draf_dist.training.interrupt import Interrupt
from draf_dist.training.jobs import AnyJob
from draf_dist.training.journal import Line
from draf_dist.training.loop import StepReport, train_steps
from draf_dist.training.pin import pin
from draf_dist.training.repeatable import repeatable
from draf_dist.training.restoring import go_on
from draf_dist.training.risk_correlation import risk_warnings
from draf_dist.training.run_folder import Fence, RunFolder, Start, as_pinned_there, enter_run, open_run
from draf_dist.training.saving import Committer, Saver
from draf_dist.training.schedule import SaveGrid
from draf_dist.training.stage import Stage, num_steps
from draf_dist.training.stages import build_stage
from draf_dist.training.state import OrderState, RunState, TrainState
from draf_dist.training.supply import Supply
from draf_dist.training.torch_engine import OneProcess
from draf_dist.training.validate import GivenUp, Interruptible
from draf_dist.training.watch.health import RollBack
from draf_dist.training.watch.room import told_what_to_lower
from draf_dist.training.watch.step_watch import watched

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
    """What one rank works with in one attempt at a run. number: of the attempt, the same on all ranks."""

    number: int
    folder: RunFolder
    stage: Stage
    backend: Backend
    engine: Engine
    saver: Saver
    state: TrainState
    books: Books
    stop: StopRequest
    grid: SaveGrid
    consumed: Consumption
    console: Console


# An epoch, and the attempt that it was part of; at last the result.
Epochs = Generator[tuple[Attempt, EpochReport], None, RunResult]


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
    with closing(_epochs(url, backend, console, stop)) as epochs:
        while True:
            try:
                next(epochs)
            except StopIteration as ended:
                result: RunResult = ended.value
                return result


def attempt_by_epochs(url: str, backend: Backend, console: Console, stop: StopRequest) -> Generator[EpochReport, None, RunResult]:
    """The same, handing over after every epoch: for a caller who decides then whether it is worth while to go on.

    Its checkpoint is waited for first. A caller who does not go on closes the generator; the run can be continued from there.
    """
    with closing(_epochs(url, backend, console, stop)) as epochs:
        while True:
            try:
                work, report = next(epochs)
            except StopIteration as ended:
                result: RunResult = ended.value
                return result
            _settle(work)
            yield report


def _epochs(url: str, backend: Backend, console: Console, stop: StopRequest) -> Epochs:
    """The same, while checkpoints may still be on their way."""
    while True:
        try:
            return (yield from _by_epochs(url, backend, console, stop))
        except RollBack:
            # What to skip stands in the ledger: from here on it is as after a kill.
            continue


def _by_epochs(url: str, backend: Backend, console: Console, stop: StopRequest) -> Epochs:
    began = time.perf_counter()
    folder = open_run(url)
    ended = folder.end()
    if ended is not None:
        return _result(folder, ended)
    check_fits(folder.job, backend.world, backend.accumulation)
    with told_what_to_lower(backend), repeatable(backend.threads, backend.device), ExitStack() as stack:
        stage = build_stage(folder.job, open_release(folder.job.release), backend, folder.url)
        engine, files = backend.start(stage.model, folder.job.optimizer)
        fence = Fence.take(folder.store) if backend.rank == 0 else None
        (number,) = _of_first(backend, [0.0 if fence is None else float(fence.attempt.number)])
        inherits = () if fence is None else fence.attempt.inherits
        try:
            end, warn = num_steps(stage), lambda message: _say(console, f"warning: {message}")
            state, broken = go_on(folder, inherits, files, backend, end, warn)
        finally:
            # A later attempt may have removed what this one inherits: then that is what is wrong, and not the checkpoints.
            if fence is not None:
                fence.check()
        grid = SaveGrid(folder.job.checkpoint.every_steps, stage.plan.order.steps_per_epoch)
        books = stack.enter_context(open_books(folder, stage, backend, state, fence, console, began))
        committer = None if fence is None else Committer(folder.checkpoints, fence.attempt, backend.world, broken, grid.last)
        saver = stack.enter_context(Saver(folder.checkpoints, files, backend.rank, committer))
        books.started()
        consumed = Consumption(stage.plan, backend.rank, backend.world)
        work = Attempt(int(number), folder, stage, backend, engine, saver, state, books, stop, grid, consumed, console)
        yield from _train(work)
        _settle(work)
        return _finish(work)


def _start(*, fresh: bool, resume: bool) -> Start:
    if fresh and resume:
        raise SpecError(explain("--fresh --resume", expected="one of them", found="both", remedy="Leave one out."))
    return "fresh" if fresh else "resume" if resume else "continue"


def check_fits(job: AnyJob, world: int, accumulation: int) -> None:
    """Refuses more micro-batches than a batch has rows.

    Raises:
        SpecError: so it is.
    """
    if job.batch_size < world * accumulation:
        expected = f"at most {job.batch_size} ranks x micro-batches, one row of a batch each"
        found = f"{world} x {accumulation}"
        raise SpecError(explain("profile", expected=expected, found=found, remedy="Use fewer, or a larger batch_size."))


def _of_first(backend: Backend, values: list[float]) -> list[float]:
    """The first rank's values, on every rank."""
    mine = torch.tensor(values, dtype=torch.float64, device=backend.device)
    found: list[float] = backend.gather(mine if backend.rank == 0 else mine[:0]).tolist()
    return found


def _train(work: Attempt) -> Iterator[tuple[Attempt, EpochReport]]:
    """Steps, with validation after every epoch and checkpoints, until the run is over.

    Raises:
        InterruptedRunError: it was asked to stop.
    """
    stage, state, backend = work.stage, work.state, work.backend
    if _is_over(work):
        return
    training, validation = stage.loader(backend), stage.validation(backend)
    supply = Supply(training, validation, work.folder.store, backend.rank, state.step, work.console)
    batches = training.batches(state.step, num_steps(stage))
    losses: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(supply)
        # A loader that is closed ends its threads at once.
        stack.callback(batches.close)
        of = {"attempt": work.number, "start": state.step, "num_rows": training.num_rows}
        watch = stack.enter_context(watched(work.folder, backend, work.books, work.console, **of, last_save=work.grid.last))
        if state.due:
            yield from _between(work, supply, losses)
            if _is_over(work):
                return
        rules = watch.rules(stage.rules(backend))
        for report in train_steps(state, work.engine, watch.batches(batches), stage.objective, rules, watch.health):
            work.consumed.add(report)
            work.books.step(_of_all_ranks(report, work), supply.stats())
            watch.after(report)
            losses.extend([report.loss] if report.skipped is None else [])
            _enter_saves(work)
            state.due = state.step % work.grid.steps_per_epoch == 0
            yield from _between(work, supply, losses)
            if _is_over(work):
                return


def _between(work: Attempt, supply: Supply, losses: list[float]) -> Iterator[tuple[Attempt, EpochReport]]:
    """What comes before the next step: a validation if one is due, unless the run is to stop; and a checkpoint, if it is time.

    losses: those of the epoch's steps (of this attempt); a validation empties them.

    Raises:
        InterruptedRunError: it was asked to stop.
    """
    state = work.state
    stopped = _asked_to_stop(work)
    validated = _validate(work, supply, losses) if state.due and not stopped else None
    # It was asked to stop meanwhile.
    stopped = stopped or state.due
    if stopped or work.grid.last(state.step) == state.step:
        _commit(work, supply, validated)
    if validated is not None:
        losses.clear()
        yield work, validated
    if stopped:
        raise _interrupted(work)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _of_all_ranks(report: StepReport, work: Attempt) -> StepReport:
    """The report with the samples of the global batch."""
    if work.stage.job.bad_data.policy == "fail":
        return replace(report, samples=work.stage.plan.num_entries(report.step - 1))
    # Only the ranks know what was left out.
    mine = torch.tensor(report.samples, dtype=torch.float64, device=work.backend.device)
    return replace(report, samples=int(work.backend.reduce(mine)))


def _asked_to_stop(work: Attempt) -> bool:
    """Whether any rank was: they must all do the same."""
    asked = torch.tensor([float(work.stop.requested is not None)], device=work.backend.device)
    return bool(work.backend.reduce(asked) > 0)


def _is_over(work: Attempt) -> bool:
    state = work.state
    return not state.due and (state.step >= num_steps(work.stage) or state.stopping.exhausted)


def _validate(work: Attempt, supply: Supply, losses: list[float]) -> EpochReport | None:
    """Measures on validation; None if it was asked to stop meanwhile: then the validation stays due."""
    state, epoch = work.state, work.state.step // work.grid.steps_per_epoch
    # An epoch may have been skipped whole.
    loss = sum(losses) / len(losses) if losses else math.nan
    split = Interruptible(supply.validation, lambda: _asked_to_stop(work))
    try:
        numbers = work.stage.validate(work.engine.module, work.backend, split)
    except GivenUp:
        work.books.spent("validate")
        return None
    state.stopping, state.due = state.stopping.after(numbers[work.stage.job.score], state.step), False
    work.books.epoch(epoch, loss, numbers, state.stopping, state.step)
    work.books.spent("validate")
    return EpochReport(epoch, state.step, numbers)


def _commit(work: Attempt, supply: Supply, validated: EpochReport | None) -> None:
    """Makes everything so far durable: books first, then a checkpoint, of which only the copy into host memory is waited for.

    The one before is durable then, so that no more than one commit in the books may lack its checkpoint.
    """
    state, job = work.state, work.stage.job
    _settle(work)
    make_durable = work.books.commit(state.step, work.consumed.settle(work.backend), supply.settle(work.backend))
    score = math.nan if validated is None else validated.numbers[job.score]
    work.saver.save(
        RunState(
            order=OrderState.at(job, work.stage.release.version, state.step),
            stopping=state.stopping,
            score=None if math.isnan(score) else score,
            due=state.due,
            job_sha256=job.sha256,
            attempt=work.number,
            world=work.backend.world,
        ),
        first=make_durable,
    )
    work.books.spent("checkpoint")


def _settle(work: Attempt) -> None:
    """Waits until the last checkpoint is durable."""
    work.saver.wait()
    _enter_saves(work)
    work.books.spent("checkpoint")


def _enter_saves(work: Attempt) -> None:
    """Books the checkpoints that became durable meanwhile; raises what stopped one that did not."""
    for report in work.saver.settled():
        work.books.saved(report)


def _interrupted(work: Attempt) -> InterruptedRunError:
    _settle(work)
    work.books.close("interrupted", work.state.stopping, work.stop.requested)
    found = f"{work.stop.requested or 'a signal'} after step {work.state.step} of {num_steps(work.stage)}"
    remedy = "A checkpoint was written: the same command continues."
    return InterruptedRunError(explain(work.folder.url, expected="to finish", found=found, remedy=remedy))


def _finish(work: Attempt) -> RunResult:
    """Exports the weights of the best validation; the run is finished once the ledger says so, and no rank leaves before."""
    if work.backend.rank == 0:
        _export(work)
        for warning in risk_warnings(work.folder.metrics(), work.state.stopping.best_step):
            _say(work.console, f"warning: {warning}")
    _of_first(work.backend, [1.0])
    ended = work.folder.end()
    assert ended is not None
    return _result(work.folder, ended)


def _export(work: Attempt) -> None:
    best = work.state.stopping
    assert best.best_step is not None
    work.books.check()
    export_best(work.folder, work.stage, best.best_step)
    work.books.spent("checkpoint")
    # It may have taken long.
    work.books.check()
    work.books.close("finished", best)


def _result(folder: RunFolder, ended: Line) -> RunResult:
    return RunResult(folder.url, folder.job.score, ended["best_loss"], ended["best_step"], ended["steps"], finished=True)
