"""Has the parts of an evaluation predicted, wherever the executor runs them, and takes from an earlier attempt what is whole."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from draf_dist.errors import DataError, DrafError, GateError, SpecError, UnreachableError, explain
from draf_dist.evaluation.part_worker import forget, predict_parts
from draf_dist.evaluation.parts import Found, Part, is_covered, read_part
from draf_dist.executor import Executor, Failed
from draf_dist.schema.release import Split
from draf_dist.storage import Store

# A part that is damaged between writing and reading is made again; one that is damaged twice has a cause.
ROUNDS = 2
UidsOf = Mapping[tuple[str, Split], NDArray[np.int64]]


def predict_all(
    store: Store, parts: Sequence[Part], uids: UidsOf, executor: Executor, on_progress: Callable[[int, int], None]
) -> dict[Part, Found]:
    """Every part, each made once: those that are stored are read, the others predicted. Parts of anything else are removed.

    store: of the run folder. uids: (URL@version, split) -> uids of the split in its order. on_progress(done, total): of parts.

    Raises:
        DrafError: what stopped a part, as soon as one is; those that are done stay.
        DataError: a part is not what the release says it must be, or can't be read back.
    """
    _remove(store, parts[0].setting.folder, keep={part.path for part in parts})
    found = _stored(store, parts, uids)
    for _ in range(ROUNDS):
        waiting = [part for part in parts if part not in found]
        on_progress(len(parts) - len(waiting), len(parts))
        if not waiting:
            return found
        _predict(waiting, executor, lambda done: on_progress(len(parts) - len(waiting) + done, len(parts)))  # noqa: B023
        found |= _stored(store, waiting, uids)
    if missing := [part for part in parts if part not in found]:
        raise DataError(
            explain(
                store.where(missing[0].path),
                expected="the predictions of every study that it is of, each once, as they were written",
                found=f"another content in {len(missing)} of {len(parts)} parts, twice",
                remedy="Run `draf release verify` on the release, and check the disk.",
            )
        )
    return found


def remove_parts(store: Store, folder: str) -> None:
    """Removes what an evaluation that is finished needs no more."""
    _remove(store, folder, keep=set())


def _remove(store: Store, folder: str, keep: set[str]) -> None:
    for path in set(store.list(folder)) - keep:
        store.delete(path)


def _stored(store: Store, parts: Sequence[Part], uids: UidsOf) -> dict[Part, Found]:
    there = set(store.list(parts[0].setting.folder))
    whole = {}
    for part in (part for part in parts if part.path in there):
        found = read_part(store, part)
        if found is not None and is_covered(part, found, uids[part.release, part.split]):
            whole[part] = found
        else:
            store.delete(part.path)
    return whole


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
