"""Work that fans out over picklable tasks: in this process, or in several; on a Ray cluster by launch/ray_executor.py.

An error in one task does not lose the others: it comes back as the task's outcome. Only an interruption ends everything.
"""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from draf_dist.errors import DrafError, InterruptedRunError

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")

# How often a task is given to a worker that then dies: a second death is taken for the task's own fault.
TRIES = 2
# An interrupted worker finishes its training step and writes a checkpoint before it goes.
GRACE_S = 60.0
# Libraries read these when they are imported: several workers with a pool of threads each would only wait for one another.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Done(Generic[ResultT]):
    """What the task of this index gave."""

    index: int
    value: ResultT


@dataclass(frozen=True)
class Failed:
    """What stopped the task of this index. message: for the user, free of data; trace: for --debug, empty where there is none."""

    index: int
    message: str
    exit_code: int
    trace: str = ""


Outcome = Done[ResultT] | Failed


class Executor(Protocol):
    """Where tasks run. One at a time or many at once: what they give may not depend on it."""

    def map(self, function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT]) -> Generator[Outcome[ResultT], None, None]:
        """The outcome of every task once, in the order in which they end; a worker that dies is replaced, its task tried again.

        function and tasks must be picklable, and a task that is repeated must give what it gave. Closing the generator ends what is
        in hand.

        Raises:
            InterruptedRunError: a task, or the process, was asked to stop; tasks in hand have been told.
        """
        ...


class Serial:
    """One task after another in this process, in order."""

    def map(self, function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT]) -> Generator[Outcome[ResultT], None, None]:
        """See Executor.map."""
        for index, task in enumerate(tasks):
            yield unless_interrupted(attempt(function, index, task))


@dataclass(frozen=True)
class Processes:
    """Several processes of this machine, one thread each."""

    num_workers: int

    def map(self, function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT]) -> Generator[Outcome[ResultT], None, None]:
        """See Executor.map."""
        waiting = deque((index, TRIES) for index in range(len(tasks)))
        busy: dict[Connection, _Worker[ResultT]] = {}
        idle: list[_Worker[ResultT]] = [_Worker.start() for _ in range(min(self.num_workers, len(tasks)))]
        try:
            while waiting or busy:
                while waiting and idle:
                    worker = idle.pop()
                    worker.index, worker.tries = waiting.popleft()
                    worker.give(function, tasks[worker.index])
                    busy[worker.connection] = worker
                for connection in wait(list(busy)):
                    assert isinstance(connection, Connection)
                    worker = busy.pop(connection)
                    outcome = worker.take()
                    idle.append(_Worker.start() if outcome is None else worker)
                    if outcome is not None:
                        yield unless_interrupted(outcome)
                    elif worker.tries > 1:
                        waiting.append((worker.index, worker.tries - 1))
                    else:
                        yield worker.died()
        finally:
            _end([*busy.values(), *idle])


def attempt(function: Callable[[TaskT], ResultT], index: int, task: TaskT) -> Outcome[ResultT]:
    """Runs one task; whatever error ends it is its outcome. Called in the worker, so that no exception need be picklable."""
    caught = _Caught(index)
    with caught:
        return Done(index, function(task))
    assert caught.outcome is not None
    return caught.outcome


def unless_interrupted(outcome: Outcome[ResultT]) -> Outcome[ResultT]:
    """The outcome.

    Raises:
        InterruptedRunError: the task was asked to stop; that is no failure of its own, and no other is begun.
    """
    if isinstance(outcome, Failed) and outcome.exit_code == InterruptedRunError.exit_code:
        raise InterruptedRunError(outcome.message)
    return outcome


class _Caught:
    """Makes an outcome of the error that ends its block. Interrupts and exits of the process go on."""

    def __init__(self, index: int) -> None:
        self._index = index
        self.outcome: Failed | None = None

    def __enter__(self) -> "_Caught":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        text = "".join(traceback.format_exception(error))
        if isinstance(error, DrafError):
            self.outcome = Failed(self._index, str(error), error.exit_code, text)
        else:
            # Without its text: a library may quote a cell or a file's name there, and so a patient.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name} line {frame.lineno}"
            self.outcome = Failed(self._index, f"{type(error).__name__} in {place}", DrafError.exit_code, text)
        return True


class _Worker(Generic[ResultT]):
    """One process that takes a task after another through a pipe."""

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self.process, self.connection = process, connection
        self.index, self.tries = -1, 0

    @classmethod
    def start(cls) -> "_Worker[ResultT]":
        """A fresh interpreter: a fork would copy the threads' locks of torch and of object stores in whatever state they are."""
        context = multiprocessing.get_context("spawn")
        mine, its = context.Pipe()
        process = context.Process(target=_serve, args=(its,), daemon=True)
        process.start()
        its.close()
        return cls(process, mine)

    def give(self, function: Callable[[TaskT], ResultT], task: TaskT) -> None:
        """Begins the task of self.index. A worker that is dead already shows when it is asked for its outcome."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send((function, self.index, task))

    def take(self) -> Outcome[ResultT] | None:
        """The outcome; None where the process died instead."""
        try:
            outcome: Outcome[ResultT] = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.connection.close()
            self.process.join()
            return None
        return outcome

    def died(self) -> Failed:
        """What to say of its task."""
        code = self.process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Failed(self.index, f"the process {how}, {TRIES} times; is there enough memory?", DrafError.exit_code)


def _serve(connection: Connection) -> None:
    """The life of a worker process."""
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    # Ctrl-C reaches every process of the terminal; here the main process decides, and training listens for both signals itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            function, index, task = connection.recv()
            connection.send(attempt(function, index, task))
        except (EOFError, BrokenPipeError):
            # The main process has ended, or wants no more.
            return


def _end(workers: Sequence[_Worker[ResultT]]) -> None:
    """Tells all, then waits for each; one that does not stop in time is killed."""
    for worker in workers:
        worker.process.terminate()
        # Training takes the signal for itself; then the worker is back at the pipe, and ends because that is closed.
        worker.connection.close()
    for worker in workers:
        worker.process.join(GRACE_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
