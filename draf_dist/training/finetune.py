"""The fine-tuning stage: a release in, a run folder with the best model out; stopped at any moment, the same command continues."""

import time
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console

from draf_dist.errors import DataError, InterruptedRunError, SpecError, explain
from draf_dist.models.calibration import calibrate
from draf_dist.models.export import DESCRIPTION, model_files
from draf_dist.training.backend import Backend, EngineFiles
from draf_dist.training.checkpoint import folder_of
from draf_dist.training.engine import Engine
from draf_dist.training.interrupt import Interrupt
from draf_dist.training.job import FinetuneJob
from draf_dist.training.journal import Journal, Line
from draf_dist.training.ledger import FILE as LEDGER
from draf_dist.training.ledger import Ledger
from draf_dist.training.loop import train_steps
from draf_dist.training.parts import Parts, build_parts, pin
from draf_dist.training.progress import ProgressLine
from draf_dist.training.repeatable import repeatable
from draf_dist.training.run_folder import MODEL, Fence, RunFolder, Start, as_pinned_there, enter_run
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import RunState, TrainState
from draf_dist.training.torch_engine import MODEL_FILE, OneProcess, load_weights
from draf_dist.training.tracking import Tracker
from draf_dist.training.validate import validate

RUNS = "runs"
ONE_PROCESS = OneProcess()


@dataclass(frozen=True)
class RunResult:
    """How a run ended. best_nll: nats on validation; best_step: when; steps: all that were done."""

    url: str
    best_nll: float
    best_step: int
    steps: int
    finished: bool


@dataclass(frozen=True)
class Attempt:
    """What one attempt at a run works with."""

    folder: RunFolder
    parts: Parts
    backend: Backend
    engine: Engine
    files: EngineFiles
    state: TrainState
    fence: Fence
    ledger: Ledger
    tracker: Tracker
    progress: ProgressLine
    interrupt: Interrupt


def finetune(
    job: FinetuneJob,
    out: str | None = None,
    *,
    fresh: bool = False,
    resume: bool = False,
    console: Console | None = None,
    backend: Backend = ONE_PROCESS,
) -> RunResult:
    """Trains until the job's last epoch or until validation stops getting better, and exports the best model.

    out: URL of the run folder, runs/<job>-<8 hex> if None. A run that exists is continued, a finished one is reported as it is.
    fresh: removes it first. resume: it must exist. backend: where it computes.

    Raises:
        SpecError: no such release; the folder holds another run; both fresh and resume; resume and no run.
        InterruptedRunError: SIGINT or SIGTERM came; a checkpoint was written.
        DataError: a broken shard; checkpoints that are all broken.
        GateError: a later attempt has taken the run over.
    """
    began = time.perf_counter()
    console = console or Console(stderr=True)
    start = _start(fresh=fresh, resume=resume)
    pinned, release = pin(job if out is None or start == "fresh" else as_pinned_there(job, out))
    folder = enter_run(out or f"{RUNS}/{pinned.run_name}", pinned, start)
    ended = folder.end()
    if ended is not None:
        return _result(folder, ended)
    with repeatable(backend.threads, backend.device), Interrupt() as interrupt, ExitStack() as stack:
        parts = build_parts(pinned, release, backend.device)
        engine, files = backend.start(parts.model, pinned.optimizer)
        fence = Fence.take(folder.store)
        state = _restore(folder, files, console)
        ledger = _open_ledger(folder, state.step, backend)
        stack.callback(ledger.journal.close)
        tracker = stack.enter_context(Tracker(folder.store, state.step))
        progress = ProgressLine(console, num_steps=parts.num_steps, steps_per_epoch=parts.order.steps_per_epoch, start=state.step)
        stack.enter_context(progress)
        ledger.spend("startup", time.perf_counter() - began)
        attempt = Attempt(folder, parts, backend, engine, files, state, fence, ledger, tracker, progress, interrupt)
        _train(attempt)
        return _finish(attempt)


def _start(*, fresh: bool, resume: bool) -> Start:
    if fresh and resume:
        raise SpecError(explain("--fresh --resume", expected="one of them", found="both", remedy="Leave one out."))
    return "fresh" if fresh else "resume" if resume else "continue"


def _restore(folder: RunFolder, files: EngineFiles, console: Console) -> TrainState:
    """The state of the newest good checkpoint, loaded into the engine; the beginning where there is none.

    Raises:
        DataError: no checkpoint is good, or it is one of another job.
    """

    def warn(message: str) -> None:
        console.print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True)

    checkpoints = folder.checkpoints
    with checkpoints.newest(warn) as found:
        if found is None:
            checkpoints.discard_past(0)
            return TrainState(0, EarlyStopping(patience=folder.job.patience))
        stored, path = found
        if stored.job_sha256 != folder.job.sha256:
            where = folder.store.where(folder_of(stored.order.step))
            remedy = "Start anew with --fresh."
            raise DataError(explain(where, expected="a checkpoint of this job", found="another job's", remedy=remedy))
        files.load(path)
        checkpoints.discard_past(stored.order.step)
        return TrainState(stored.order.step, stored.stopping)


def _open_ledger(folder: RunFolder, start: int, backend: Backend) -> Ledger:
    journal = Journal(folder.store, LEDGER)
    number = 1 + sum(line["event"] == "attempt" for line in journal.lines)
    ledger = Ledger(journal, number, start, backend.world, backend.threads)
    ledger.open()
    return ledger


def _train(attempt: Attempt) -> None:
    """Steps, with validation after every epoch and checkpoints, until the run is over.

    Raises:
        InterruptedRunError: a signal came.
    """
    parts, state = attempt.parts, attempt.state
    if _is_over(attempt):
        return
    batches = parts.loader(attempt.backend).batches(state.step, parts.num_steps)
    losses: list[float] = []
    with ExitStack() as stack:
        # A loader that is closed ends its threads at once.
        stack.callback(batches.close)
        for report in train_steps(state, attempt.engine, batches, parts.objective, parts.rules(attempt.backend)):
            attempt.ledger.consume(report)
            attempt.tracker.step(report)
            attempt.progress.step(report)
            losses.append(report.loss)
            epoch, within = divmod(state.step, parts.order.steps_per_epoch)
            if within == 0:
                _validate(attempt, epoch, sum(losses) / len(losses))
                losses.clear()
            if within == 0 or state.step % parts.job.checkpoint.every_steps == 0 or attempt.interrupt.requested:
                _commit(attempt)
            if _is_over(attempt):
                return
            if attempt.interrupt.requested:
                raise _interrupted(attempt)


def _is_over(attempt: Attempt) -> bool:
    return attempt.state.step >= attempt.parts.num_steps or attempt.state.stopping.exhausted


def _validate(attempt: Attempt, epoch: int, loss: float) -> None:
    """Measures on validation; `loss` is the mean over the epoch's steps (of this attempt)."""
    began = time.perf_counter()
    parts, state = attempt.parts, attempt.state
    calibrate(attempt.engine.module, parts.calibration())
    numbers = validate(attempt.engine.module, parts.validation(), parts.prepared, parts.job.passes_eval)
    state.stopping = state.stopping.after(numbers["nll"], state.step)
    attempt.tracker.epoch(epoch, state.step, numbers)
    attempt.progress.epoch(epoch, loss, numbers, best=state.stopping.best_step == state.step)
    attempt.ledger.spend("validate", time.perf_counter() - began)


def _commit(attempt: Attempt) -> None:
    """Makes everything so far durable: books first, the checkpoint's manifest last."""
    began = time.perf_counter()
    state, checkpoints = attempt.state, attempt.folder.checkpoints
    attempt.fence.check()
    attempt.tracker.flush()
    attempt.ledger.commit(state.step)
    stored = RunState(
        order=attempt.parts.order_state.model_copy(update={"step": state.step}),
        stopping=state.stopping,
        job_sha256=attempt.parts.job.sha256,
        attempt=attempt.ledger.attempt,
        world=attempt.backend.world,
    )
    checkpoints.commit(stored, attempt.files.save, guard=attempt.fence.check)
    checkpoints.prune(state.stopping.best_step)
    attempt.ledger.spend("checkpoint", time.perf_counter() - began)


def _interrupted(attempt: Attempt) -> InterruptedRunError:
    best = attempt.state.stopping
    attempt.ledger.close("interrupted", best_nll=best.best_nll, best_step=best.best_step)
    found = f"{attempt.interrupt.requested} after step {attempt.state.step} of {attempt.parts.num_steps}"
    remedy = "A checkpoint was written: the same command continues."
    return InterruptedRunError(explain(attempt.folder.url, expected="to finish", found=found, remedy=remedy))


def _finish(attempt: Attempt) -> RunResult:
    """Exports the weights of the best validation; the run is finished once the ledger says so."""
    began = time.perf_counter()
    parts, store, best = attempt.parts, attempt.folder.store, attempt.state.stopping
    assert best.best_step is not None
    attempt.fence.check()
    _load_best(attempt, best.best_step)
    exported = model_files(parts.model, parts.job.model, parts.release.schema, parts.release.stats)
    for name in sorted(exported, key=lambda name: name == DESCRIPTION):
        store.write(f"{MODEL}/{name}", exported[name])
    attempt.ledger.spend("checkpoint", time.perf_counter() - began)
    attempt.ledger.close("finished", best_nll=best.best_nll, best_step=best.best_step)
    ended = attempt.folder.end()
    assert ended is not None
    return _result(attempt.folder, ended)


def _load_best(attempt: Attempt, step: int) -> None:
    try:
        with attempt.folder.checkpoints.opened(step) as files:
            load_weights(attempt.parts.model, files / MODEL_FILE)
    except DataError as error:
        # Nothing can bring them back but training again, so no later call of the same command would get further.
        remedy = "Start anew with --fresh: the same job gives the same weights."
        where = attempt.folder.store.where(folder_of(step))
        found = f"a broken checkpoint ({error})"
        raise DataError(explain(where, expected="the weights of the best validation", found=found, remedy=remedy)) from error


def _result(folder: RunFolder, ended: Line) -> RunResult:
    return RunResult(folder.url, ended["best_nll"], ended["best_step"], ended["steps"], finished=True)
