"""Saving while training goes on: training waits for a copy in host memory, a thread hashes, writes and commits it.

Nothing that the thread does is a collective. One save is in hand at a time, so one copy is enough: the next save waits for it.
"""

import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

from draf_dist.config.spec import canonical_json
from draf_dist.errors import UnreachableError, explain
from draf_dist.protocols.attempts import AttemptRecord
from draf_dist.protocols.checkpoint import CheckpointManifest, commit, content_of_bytes, prune, put_part
from draf_dist.protocols.names import STATE, CheckpointName, checkpoint_folder, checkpoint_name, part_file, tensors_file
from draf_dist.protocols.operations import run_on
from draf_dist.training.backend import EngineFiles
from draf_dist.training.checkpoint import Checkpoints
from draf_dist.training.fragments import HostCopy
from draf_dist.training.state import RunState

# A rank may still be sending its part while the first one waits: as long as a store may keep one request waiting, and once more.
PARTS_TIMEOUT_S = 1800.0
# How long a run that failed waits for the save in hand: it is good, unless it is what failed.
GRACE_S = 20.0


@dataclass(frozen=True)
class SaveReport:
    """One checkpoint that is durable, as one rank saw it.

    size_bytes: of all ranks together; on any but the first of its own part. snapshot_s: training waited so long for the copy.
    books_s: until the books were durable, about 0 on any but the first. upload_s: hashing and writing this rank's part.
    commit_s: from then until the manifest was there and what it replaces was gone, 0 on any but the first. The last three passed
    while training went on.
    """

    step: int
    size_bytes: int
    snapshot_s: float
    books_s: float
    upload_s: float
    commit_s: float


@dataclass(frozen=True)
class Committer:
    """What the first rank does besides: it makes a checkpoint of the parts, and removes those that it replaces.

    broken: ids of checkpoints that can't be used; they go too, and push no good one out. last_save: the last step that a run saves
    unasked, up to a step (see schedule.SaveGrid): a save that was asked for does not push that one out.
    """

    checkpoints: Checkpoints
    attempt: AttemptRecord
    world: int
    broken: Collection[str] = ()
    last_save: Callable[[int], int] = lambda step: step
    _scores: dict[str, float | None] = field(default_factory=dict)

    def commit(self, step: int, given_up: Callable[[], bool]) -> CheckpointManifest:
        """Waits for the parts of all ranks.

        Raises:
            GateError: a later attempt has taken the run over.
            UnreachableError: the parts of some ranks did not come; the message names them.
        """
        patience = _Patience(self, CheckpointName(self.attempt.number, step).id, given_up)
        manifest = run_on(self.checkpoints.store, commit(self.attempt, step, self.world), wait=patience)
        self._prune(step)
        return manifest

    def _prune(self, step: int) -> None:
        store, best = self.checkpoints.store, [*self._best(), self.last_save(step)]
        for gone in run_on(store, prune(self.attempt, keep=self.checkpoints.keep, best=best, broken=self.broken)):
            local = store.local_path(checkpoint_folder(gone))
            if local is not None:
                # An older attempt that still writes there keeps its folder.
                with suppress(OSError):
                    local.rmdir()

    def _best(self) -> list[int]:
        """Steps of the checkpoints with the lowest scores, the earlier one where two have the same."""
        valid = set(self.checkpoints.ids()) - set(self.broken)
        for checkpoint in valid - self._scores.keys():
            self._scores[checkpoint] = self.checkpoints.score(checkpoint)
        scored = ((score, each) for each, score in self._scores.items() if score is not None and each in valid)
        ranked = sorted((score, checkpoint_name(each).step) for score, each in scored)
        return [step for _, step in ranked[: self.checkpoints.keep_best]]


@dataclass
class _Patience:
    """Waits for parts, but not for ever."""

    committer: Committer
    checkpoint: str
    given_up: Callable[[], bool]
    began: float = field(default_factory=time.monotonic)

    def __call__(self, seconds: float) -> None:
        waited_s = time.monotonic() - self.began
        if waited_s > PARTS_TIMEOUT_S or self.given_up():
            folder, store = checkpoint_folder(self.checkpoint), self.committer.checkpoints.store
            there = set(store.list(folder))
            missing = [str(rank) for rank in range(self.committer.world) if f"{folder}/{part_file(rank)}" not in there]
            found = f"nothing of rank {', '.join(missing)} after {waited_s:.0f} s"
            remedy = "See what became of these ranks; the same command continues from the checkpoint before."
            raise UnreachableError(explain(store.where(folder), expected="the parts of all ranks", found=found, remedy=remedy))
        time.sleep(seconds)


class Saver:
    """Saves one rank's part of every checkpoint of an attempt. Left, it waits for what is in hand.

    An error of the thread is raised by whichever method is called next: StorageFullError, UnreachableError, GateError.
    """

    def __init__(self, checkpoints: Checkpoints, files: EngineFiles, rank: int, committer: Committer | None) -> None:
        """committer: of the first rank only."""
        self._store, self._files, self._rank, self._committer = checkpoints.store, files, rank, committer
        self._copy = HostCopy()
        self._pending: _Task | None = None
        self._done: list[SaveReport] = []
        self._given_up = threading.Event()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or issubclass(kind, GeneratorExit):
            self.wait()
        elif issubclass(kind, Exception) and self._pending is not None:
            self._pending.join(GRACE_S)
        self._given_up.set()

    def save(self, state: RunState, first: Callable[[], None] = lambda: None) -> None:
        """Waits for the save before, copies what this rank owns, and leaves the rest to the thread. Every rank calls it.

        first: what the thread does before anything of the checkpoint is written; if that fails there is none.
        """
        self.wait()
        began = time.perf_counter()
        content: dict[str, bytes | memoryview] = {tensors_file(self._rank): self._copy.take(self._files.fragments())}
        if self._rank == 0:
            content[STATE] = canonical_json(state)
        snapshot_s = time.perf_counter() - began
        self._pending = _Task(lambda: self._put(state, content, snapshot_s, first))

    def settled(self) -> list[SaveReport]:
        """The saves that became durable since the last call; does not wait."""
        if self._pending is not None and self._pending.ended:
            self.wait()
        done, self._done = self._done, []
        return done

    def wait(self) -> None:
        """Waits until nothing is in hand."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._done.append(pending.result())

    def _put(
        self, state: RunState, content: dict[str, bytes | memoryview], snapshot_s: float, first: Callable[[], None]
    ) -> SaveReport:
        entered = time.perf_counter()
        first()
        began = time.perf_counter()
        step = state.order.step
        checkpoint = CheckpointName(state.attempt, step).id
        files = {name: content_of_bytes(data) for name, data in content.items()}
        part = run_on(self._store, put_part(checkpoint, self._rank, files))
        put = time.perf_counter()
        records = part.files
        if self._committer is not None:
            records = self._committer.commit(step, self._given_up.is_set).files
        size_bytes = sum(record.size_bytes for record in records.values())
        return SaveReport(step, size_bytes, snapshot_s, began - entered, put - began, time.perf_counter() - put)


class _Task:
    """A function in a thread of its own. A daemon: a process that is to end does not wait for a store that does not answer."""

    def __init__(self, act: Callable[[], SaveReport]) -> None:
        self._act = act
        self._result: SaveReport | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="draf-save", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether `result` would not wait."""
        return not self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Waits, but no longer than that."""
        self._thread.join(timeout_s)

    def result(self) -> SaveReport:
        """Waits; raises what the function raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._act()
        except BaseException as error:  # noqa: BLE001
            self._error = error
