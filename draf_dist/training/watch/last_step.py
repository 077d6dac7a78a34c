"""progress.json: how far an attempt has come, for the one that follows if it should be killed.

On a remote store metrics.jsonl is written with checkpoints only, so of the steps after the last one nothing would be known. A
thread writes this one object at most every EVERY_S; training never waits for it. A stale attempt may write over a newer one's until
it notices: then what the newer one did past its last checkpoint is known from metrics.jsonl at best.
"""

import json
import math
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from draf_dist.errors import DrafError
from draf_dist.storage import MissingError, Store
from draf_dist.training.journal import Line, read_lines
from draf_dist.training.tracking import METRICS

PROGRESS = "progress.json"
EVERY_S = 10.0
# A store that does not answer is not waited for at the end.
PATIENCE_S = 1.0


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False))
@dataclass(frozen=True)
class LastStep:
    """The last step that is known of an attempt.

    step: steps done; time: when, seconds since 1970; lost_s: what was done since its last commit took, and is lost with it.
    """

    attempt: int
    step: int
    time: float
    lost_s: float


_STORED = TypeAdapter(LastStep)


class Progress:
    """Of one attempt, while entered."""

    def __init__(self, store: Store, attempt: int) -> None:
        self._store, self._attempt = store, attempt
        self._last: LastStep | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="draf-progress", daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)

    def at(self, step: int, lost_s: float) -> None:
        """So many steps are done."""
        self._last = LastStep(self._attempt, step, round(time.time(), 3), round(lost_s, 6))

    def _watch(self) -> None:
        written = None
        while not self._stop.wait(EVERY_S):
            last = self._last
            if last is not None and last != written:
                # Training itself will meet what is wrong with the store.
                with suppress(DrafError):
                    self._store.write(PROGRESS, json.dumps(asdict(last)).encode())
                    written = last


def last_step(store: Store, ledger: Iterable[Line]) -> LastStep | None:
    """The last sign of the newest attempt in a ledger, None where its lines there say as much; metrics.jsonl as it left them."""
    attempt = stop = 0
    began = 0.0
    ended = True
    for line in ledger:
        if line["event"] == "attempt":
            attempt, stop, ended = line["attempt"], line["start"], False
            began = line["began"] if "began" in line else line["time"]
        elif line["event"] == "commit":
            stop = line["stop"]
        elif line["event"] == "end":
            ended = True
    if ended:
        return None
    found = [_written(store), _logged(attempt, stop, began, read_lines(store, METRICS))]
    later = [each for each in found if each is not None and each.attempt == attempt and each.step > stop]
    return max(later, key=lambda each: each.step, default=None)


def _written(store: Store) -> LastStep | None:
    """What progress.json says; None where there is none, or one that can't be read: the run can do without."""
    try:
        return _STORED.validate_json(store.read(PROGRESS))
    except (MissingError, ValidationError):
        return None


def _logged(attempt: int, stop: int, began: float, metrics: Iterable[Line]) -> LastStep | None:
    """From the lines past the last commit since the attempt began.

    It takes those of earlier attempts out before it adds its own, and may have died before it did: they are no sign of it.
    """
    steps = (line for line in metrics if line["event"] == "step" and line["step"] > stop)
    lines = [line for line in steps if line.get("time", -math.inf) >= began]
    lost_s = sum(line["wait_s"] + line["compute_s"] for line in lines)
    return LastStep(attempt, lines[-1]["step"], lines[-1]["time"], round(lost_s, 6)) if lines else None
