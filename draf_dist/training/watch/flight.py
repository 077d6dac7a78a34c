"""The flight recorder: the last steps of one rank, and what every thread was doing when something went wrong.

While all is well it is a ring on a local disk (ring.py). When something goes wrong it is written to the run folder as
flight/<attempt>-<rank>.json. A process that was killed leaves its ring behind: the next attempt on that machine writes it to the
run folder. Of samples it holds uids alone, which are keyed hashes.
"""

import hashlib
import json
import math
import os
import struct
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from draf_dist.errors import DataError, DrafError
from draf_dist.schema.identity import uid_name
from draf_dist.storage import Store
from draf_dist.training.loop import StepReport
from draf_dist.training.watch.ring import Ring, RingContent, read_ring
from draf_dist.training.watch.room import oom_kills
from draf_dist.training.watch.stacks import stacks

FLIGHT = "flight"
RING = ".ring"
NUM_STEPS = 64
# Beside the uids: loss terms, seconds.
FACTS_BYTES = 2048
_LENGTH = struct.Struct("<I")


@dataclass
class FlightRecorder:
    """Of one rank in one attempt. world: ranks of the attempt.

    A rank whose disk has no room for the ring goes on without: `missing` says why, and so does the file where something goes wrong.
    """

    store: Store
    attempt: int
    rank: int
    world: int
    num_rows: int
    missing: str | None = field(init=False, default=None)
    _ring: Ring | None = field(init=False, default=None)
    _begun: float = field(init=False, default=0.0)
    _troubles: list[dict[str, Any]] = field(init=False, default_factory=list)
    _unwritten: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        about = {"attempt": self.attempt, "rank": self.rank, "world": self.world, "pid": os.getpid(), "oom_kills": oom_kills()}
        path = ring_folder(self.store) / f"{_name(self.attempt, self.rank)}{RING}"
        try:
            self._ring = Ring(path, about, num_slots=NUM_STEPS, record_bytes=FACTS_BYTES + 8 * self.num_rows)
        except OSError as error:
            self.missing = f"the last steps are not recorded: {error.strerror}"
            self._troubles.append({"what": self.missing, "time": round(time.time(), 3)})

    @property
    def path(self) -> str:
        """Of the file that is written when something goes wrong, in the run folder."""
        return _path(self.attempt, self.rank)

    def begin(self, step: int, uids: Tensor) -> None:
        """A batch was handed over. step: the one that it will be, as metrics.jsonl counts; uids: int64 of its rows."""
        self._begun = time.time()
        self._put(step, {"step": step, "begun": self._begun}, uids)

    def end(self, report: StepReport) -> None:
        """A step was done."""
        facts = {
            "step": report.step,
            "begun": self._begun,
            "loss": report.loss,
            "terms": report.terms,
            "gradient_norm": report.gradient_norm,
            "wait_s": report.wait_s,
            "compute_s": report.compute_s,
        }
        self._put(report.step, facts, report.uids)

    def trouble(self, what: str, **facts: object) -> DrafError | None:
        """Writes everything to the run folder, with the stacks of all threads; the error where that fails, for who wants to tell.

        what: in one line, free of data.
        """
        self._troubles.append({"what": what, "time": round(time.time(), 3), **facts, "stacks": stacks()})
        found = None if self._ring is None else read_ring(self._ring.path)
        failed = _write(self.store, _document(found, self.attempt, self.rank, self.world, self._troubles))
        self._unwritten = failed is not None
        return failed

    def close(self) -> None:
        """The attempt has ended in order, or its trouble is written: the ring goes. Where it could not be written, it stays."""
        if self._ring is not None:
            self._ring.__exit__(None, None, None)
            if not self._unwritten:
                self._ring.path.unlink(missing_ok=True)
            self._ring = None

    def _put(self, step: int, facts: dict[str, Any], uids: Tensor) -> None:
        if self._ring is not None:
            text = json.dumps(facts).encode()
            self._ring.put(step, _LENGTH.pack(len(text)) + text + uids[uids >= 0].numpy().tobytes())


def ring_folder(store: Store) -> Path:
    """Where the rings of a run lie on this machine: in the run folder itself if that is local."""
    local = store.local_path(FLIGHT)
    if local is not None:
        return local
    digest = hashlib.sha256(store.url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"draf-flight-{os.getuid()}", digest)


def recover(store: Store) -> list[str]:
    """Writes what killed attempts left on this machine to the run folder, and takes it away; one line for each, for the terminal.

    Several ranks may call it at once; a ring whose process still lives is left alone.
    """
    folder, told = ring_folder(store), []
    for path in sorted(folder.glob(f"*{RING}")) if folder.is_dir() else []:
        with suppress(DataError, FileNotFoundError):
            found = read_ring(path)
            if _lives(found.about["pid"]):
                continue
            # Of several ranks one gets it.
            claimed = path.rename(path.with_suffix(f".{os.getpid()}"))
            told.append(_recovered(store, found, claimed, path))
    return told


def read_flight(store: Store, attempt: int, rank: int) -> dict[str, Any]:
    """The file of a rank in an attempt: from the run folder, or from its ring while there is one on this machine.

    Raises:
        MissingError: neither is there.
    """
    ring = ring_folder(store) / f"{_name(attempt, rank)}{RING}"
    if not store.exists(_path(attempt, rank)) and ring.exists():
        found = read_ring(ring)
        return _document(found, attempt, rank, found.about["world"], [])
    read: dict[str, Any] = json.loads(store.read(_path(attempt, rank)))
    return read


def _recovered(store: Store, found: RingContent, claimed: Path, path: Path) -> str:
    about, now = found.about, oom_kills()
    killed = "killed"
    if now is not None and about["oom_kills"] is not None and now > about["oom_kills"]:
        killed = "killed, and the kernel has killed for memory since it began"
    where = _path(about["attempt"], about["rank"])
    # What it had written before it was killed: the stacks of a hung step, say.
    before = json.loads(store.read(where))["troubles"] if store.exists(where) else []
    document = _document(found, about["attempt"], about["rank"], about["world"], [*before, {"what": killed}])
    failed = _write(store, document)
    if failed is None:
        claimed.unlink()
    else:
        # For the attempt after this one.
        claimed.rename(path)
    last = document["steps"][-1]["step"] if document["steps"] else 0
    told = where if failed is None else f"not written: {failed}"
    return f"rank {about['rank']} of attempt {about['attempt']} was {killed}, in or after step {last} ({told})"


def _document(found: RingContent | None, attempt: int, rank: int, world: int, troubles: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [] if found is None else [_step(record) for record in found.records.values()]
    return {"format": 1, "attempt": attempt, "rank": rank, "world": world, "troubles": troubles, "steps": steps}


def _step(record: bytes) -> dict[str, Any]:
    (length,) = _LENGTH.unpack_from(record)
    facts: dict[str, Any] = json.loads(record[_LENGTH.size : _LENGTH.size + length])
    # A record that did not fit was cut: what is left of its last uid is none.
    data = record[_LENGTH.size + length :]
    uids = np.frombuffer(data[: len(data) // 8 * 8], dtype=np.int64)
    return {**facts, "uids": [uid_name(uid) for uid in uids.tolist()]}


def _write(store: Store, document: dict[str, Any]) -> DrafError | None:
    data = json.dumps(storable(document), allow_nan=False, indent=1).encode()
    try:
        store.write(_path(document["attempt"], document["rank"]), data)
    except DrafError as error:
        # It tells of another error, which matters more.
        return error
    return None


def storable(value: Any) -> Any:
    """A tree of JSON with "nan" and "inf" as words: they are what is looked for here, and no JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: storable(item) for key, item in value.items()}
    return [storable(item) for item in value] if isinstance(value, list | tuple) else value


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _name(attempt: int, rank: int) -> str:
    return f"{attempt:08d}-{rank:05d}"


def _path(attempt: int, rank: int) -> str:
    return f"{FLIGHT}/{_name(attempt, rank)}.json"
