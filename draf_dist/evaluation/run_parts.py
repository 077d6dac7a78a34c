"""Has the parts of an evaluation predicted, wherever the executor runs them, and takes from an earlier attempt what is whole.

Several evaluations of one run may go on at the same time. Each has a folder for its parts; those with the same one share them, and
who is done first empties it. So a part may be gone at any moment: it is made again.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from draf_dist.errors import DataError, DrafError, GateError, SpecError, UnreachableError, explain
from draf_dist.evaluation.part_worker import forget, predict_parts
from draf_dist.evaluation.parts import FOLDER, Found, Part, is_covered, read_part
from draf_dist.executor import Executor, Failed
from draf_dist.schema.release import Split
from draf_dist.storage import MissingError, Store

# A part that is damaged between writing and reading is made again; one that is damaged twice has a cause.
DAMAGED = 2
# Each other evaluation of the same settings takes parts away once at most.
ROUNDS = 6
# In the folder of an evaluation: when it was last at work.
MARK = "mark.json"
RENEWED_S, GIVEN_UP_S = 3600.0, 86_400.0
UidsOf = Mapping[tuple[str, Split], NDArray[np.int64]]


def predict_all(
    store: Store, parts: Sequence[Part], uids: UidsOf, executor: Executor, on_progress: Callable[[int, int], None]
) -> dict[Part, Found]:
    """Every part: those that are stored are read, the others predicted. Parts of evaluations that were given up are removed.

    store: of the run folder. uids: (URL@version, split) -> uids of the split in its order. on_progress(done, total): of parts.

    Raises:
        DrafError: what stopped a part, as soon as one is; those that are done stay.
        DataError: a part is not what the release says it must be, or can't be read back.
        GateError: parts are gone again and again.
    """
    mark = _Mark(store, parts[0].setting.folder)
    mark.renew()
    _remove_given_up(store, mark.folder)
    found, _ = _stored(store, parts, uids)
    damaged: Counter[Part] = Counter()
    for _ in range(ROUNDS):
        waiting = [part for part in parts if part not in found]
        on_progress(len(parts) - len(waiting), len(parts))
        if not waiting:
            return found

        def on_done(done: int, before: int = len(parts) - len(waiting)) -> None:
            mark.renew()
            on_progress(before + done, len(parts))

        _predict(waiting, executor, on_done)
        whole, wrong = _stored(store, waiting, uids)
        found |= whole
        damaged.update(wrong)
        _check_damaged(store, damaged, len(parts))
    waiting = [part for part in parts if part not in found]
    if waiting:
        raise _gone(store, waiting, len(parts))
    return found


def remove_parts(store: Store, folder: str) -> None:
    """Removes what an evaluation that is finished needs no more."""
    _remove(store, store.list(folder))


def _remove(store: Store, paths: Iterable[str]) -> None:
    """The marks go last: a folder that is half emptied is known for what it was."""
    for path in sorted(paths, key=lambda path: path.endswith(f"/{MARK}")):
        store.delete(path)


@dataclass
class _Mark:
    """Says that the evaluation whose parts lie in a folder is at work, so that no other takes it for one that was given up."""

    store: Store
    folder: str
    _renewed: float | None = None

    def renew(self) -> None:
        """Called often; written now and then."""
        now = time.time()
        if self._renewed is None or now - self._renewed > RENEWED_S:
            self.store.write(f"{self.folder}/{MARK}", json.dumps({"at": now}).encode())
            self._renewed = now


def _remove_given_up(store: Store, own: str) -> None:
    """Removes parts of other evaluations that nobody has been at for a day. If somebody is after all, they are made again."""
    by_folder = defaultdict(list)
    for path in store.list(FOLDER):
        by_folder[path.rpartition("/")[0]].append(path)
    for folder, paths in by_folder.items():
        # Clocks of two machines differ by less; a time that is far ahead is as wrong as none.
        if folder != own and abs(time.time() - _marked(store, folder)) > GIVEN_UP_S:
            _remove(store, paths)


def _marked(store: Store, folder: str) -> float:
    try:
        return float(json.loads(store.read(f"{folder}/{MARK}"))["at"])
    except (MissingError, ValueError, KeyError, TypeError):
        return 0.0


def _stored(store: Store, parts: Sequence[Part], uids: UidsOf) -> tuple[dict[Part, Found], list[Part]]:
    """The parts that are there and whole, and those that are there and are not, which are removed."""
    there = set(store.list(parts[0].setting.folder))
    whole, wrong = {}, []
    for part in (part for part in parts if part.path in there):
        found = read_part(store, part)
        if found is not None and is_covered(part, found, uids[part.release, part.split]):
            whole[part] = found
        elif store.exists(part.path):
            wrong.append(part)
            store.delete(part.path)
    return whole, wrong


def _check_damaged(store: Store, damaged: Counter[Part], num_parts: int) -> None:
    if twice := [part for part, times in damaged.items() if times >= DAMAGED]:
        raise DataError(
            explain(
                store.where(twice[0].path),
                expected="the predictions of every study that it is of, each once, as they were written",
                found=f"another content in {len(twice)} of {num_parts} parts, twice",
                remedy="Run `draf release verify` on the release, and check the disk.",
            )
        )


def _gone(store: Store, waiting: Sequence[Part], num_parts: int) -> GateError:
    return GateError(
        explain(
            store.where(waiting[0].path),
            expected="a part as it was written",
            found=f"nothing in {len(waiting)} of {num_parts} parts, after {ROUNDS} attempts",
            remedy="Others remove them: let other evaluations of this run end, and run the same command again.",
        )
    )


def _predict(parts: Sequence[Part], executor: Executor, on_done: Callable[[int], None]) -> None:
    size = parts[0].setting.place.parts_per_task
    tasks = [tuple(parts[start : start + size]) for start in range(0, len(parts), size)]
    done = 0
    try:
        with closing(executor.map(predict_parts, tasks)) as outcomes:
            for outcome in outcomes:
                if isinstance(outcome, Failed):
                    raise _error(outcome)
                done += len(tasks[outcome.index])
                on_done(done)
    finally:
        # Tasks in this process leave a model and studies behind.
        forget()


class _Trace(Exception):  # noqa: N818
    """The traceback of another process, shown with --debug as the cause of the error."""


def _error(failed: Failed) -> DrafError:
    kinds = (SpecError, DataError, GateError, UnreachableError)
    kind = next((kind for kind in kinds if kind.exit_code == failed.exit_code), DrafError)
    error = kind(failed.message)
    error.__cause__ = _Trace(failed.trace)
    return error
