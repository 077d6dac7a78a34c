"""An evaluation cut into parts that any worker can predict: some batches of a split, under one condition, by one model.

A part is a whole number of the split's batches, cut by sizes alone: neither the number of workers nor what was done before changes
what a batch holds, so the numbers are the same bit for bit. Its file is written at once, under a name that holds all that its
numbers depend on, and read back only if it is whole.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from draf_dist import __version__
from draf_dist.config.spec import canonical_json, fingerprint
from draf_dist.data.bad_data import BadData
from draf_dist.data.corruption import AnyOperation
from draf_dist.data.loader_stats import LoaderStats
from draf_dist.errors import DataError
from draf_dist.evaluation.job import SweepSettings
from draf_dist.evaluation.predictions import CLEAN, Predictions, from_parquet, to_parquet
from draf_dist.schema.release import Split
from draf_dist.storage import MissingError, Store

# Raise it when predictions are stored otherwise, or come out otherwise from the same model and data.
FORMAT = 1
FOLDER = "evaluating"
REMOVALS: Final = "removals"
# So that a lost worker costs seconds, and a part's own costs (a file, a pass of the loader) are small beside it. A study of a sweep
# is predicted under every entry of a grid.
CLEAN_STUDIES, SWEEP_STUDIES = 512, 64
# Of a process that has a GPU Ray makes no second use, and to start one takes as long as hundreds of parts.
PARTS_PER_GPU_TASK = 32

Condition = AnyOperation | Literal["none", "removals"]


@dataclass(frozen=True)
class Place:
    """What a worker computes with. threads: of one operator, which is part of what gives the same bits; decode_threads is not."""

    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    decode_threads: int = 2

    @property
    def parts_per_task(self) -> int:
        """How many parts are given to a worker at a time."""
        return 1 if self.device == "cpu" else PARTS_PER_GPU_TASK


@dataclass(frozen=True)
class Setting:
    """What all parts of one evaluation share.

    run: URL of the run folder; folder: where parts lie in it. model_sha256: see Subject. visit: another one in every call, so that
    no worker takes what it holds of an earlier evaluation for this one's.
    """

    run: str
    folder: str
    model_sha256: str
    batch_size: int
    seed: int
    bad_data: BadData
    place: Place
    visit: str


@dataclass(frozen=True)
class Part:
    """Batches [start, stop) of a split under a condition.

    release: URL@version. condition: an operation at all entries of its grid, REMOVALS, or CLEAN. largest_uid: studies beyond it
    take no part (in a sweep); None: all do.
    """

    setting: Setting
    release: str
    split: Split
    start: int
    stop: int
    passes: int
    condition: Condition = CLEAN
    largest_uid: int | None = None

    @property
    def steps(self) -> range:
        """Numbers of its batches."""
        return range(self.start, self.stop)

    @cached_property
    def key(self) -> str:
        """Of everything that its numbers depend on: 64 hex digits. Where run and release lie is no part of it."""
        shared, condition = self.setting, self.condition
        return fingerprint(
            {
                "format": [FORMAT, __version__, str(torch.__version__)],
                "model": shared.model_sha256,
                "release": self.release.rpartition("@")[2],
                "split": [self.split, self.start, self.stop, shared.batch_size, self.largest_uid],
                "condition": condition if isinstance(condition, str) else condition.model_dump(mode="json"),
                "noise": [self.passes, shared.seed],
                "policy": shared.bad_data.policy,
                "place": [shared.place.device, shared.place.threads],
            }
        )

    @property
    def path(self) -> str:
        """Where it is stored in the run folder."""
        kind = self.condition if isinstance(self.condition, str) else self.condition.kind
        return f"{self.setting.folder}/{self.split}-{kind}-{self.start:06d}-{self.key[:16]}.part"


@dataclass(frozen=True)
class Found:
    """What came of a part: predictions by what was applied, none where no study is left. read: members, left_out, lost_samples."""

    predictions: tuple[Predictions, ...]
    read: LoaderStats


def clean_parts(setting: Setting, release: str, split: Split, num_studies: int, passes: int) -> list[Part]:
    """All of a split, as it is."""
    step = max(1, CLEAN_STUDIES // setting.batch_size)
    cut = _cut(_num_batches(num_studies, setting), step)
    return [Part(setting, release, split, start, stop, passes) for start, stop in cut]


def sweep_parts(setting: Setting, release: str, sweep: SweepSettings, uids: NDArray[np.int64]) -> list[Part]:
    """The studies of a sweep (those with the smallest uids) under all of its conditions; uids: of the split, int64 (N,).

    All conditions of some batches stand together: who goes on with the next one has the studies at hand.
    """
    chosen = np.sort(uids)[: sweep.max_studies]
    num_batches = _num_batches(len(uids), setting)
    step = max(1, -(-num_batches * SWEEP_STUDIES // len(chosen)))
    conditions: list[Condition] = [CLEAN, *sweep.operations, REMOVALS]
    return [
        Part(setting, release, sweep.split, start, stop, sweep.passes, condition, int(chosen[-1]))
        for start, stop in _cut(num_batches, step)
        for condition in conditions
    ]


def write_part(store: Store, part: Part, found: Found) -> None:
    """Stores a part: a line of JSON that says what it is, then its predictions."""
    body = to_parquet(found.predictions) if found.predictions else b""
    counts = {"members": found.read.members, "left_out": found.read.left_out, "lost_samples": found.read.lost_samples}
    head = {"key": part.key, "sha256": hashlib.sha256(body).hexdigest(), "read": counts}
    store.write(part.path, canonical_json(head) + b"\n" + body)


def read_part(store: Store, part: Part) -> Found | None:
    """A part that was stored; None where there is none, or one that is damaged or another's: it is predicted again."""
    try:
        head, _, body = store.read(part.path).partition(b"\n")
        about = json.loads(head)
        if (about["key"], about["sha256"]) != (part.key, hashlib.sha256(body).hexdigest()):
            return None
        return Found(tuple(from_parquet(body)) if body else (), LoaderStats(**about["read"]))
    except (MissingError, DataError, ValueError, KeyError, TypeError):
        return None


def is_covered(part: Part, found: Found, uids: NDArray[np.int64]) -> bool:
    """Whether it has the studies that the release says, each once, in its order; uids: of the whole split, int64 (N,)."""
    size = part.setting.batch_size
    expected = uids[part.start * size : part.stop * size]
    if part.largest_uid is not None:
        expected = expected[expected <= part.largest_uid]
    if part.condition == CLEAN and sum(one.num_studies for one in found.predictions) != len(expected) - found.read.lost_samples:
        return False
    may_lack = part.condition == REMOVALS or part.setting.bad_data.policy != "fail"
    return all(_in_order(one.uid, expected, may_lack=may_lack) for one in found.predictions)


def _in_order(found: NDArray[np.int64], expected: NDArray[np.int64], *, may_lack: bool) -> bool:
    return np.array_equal(found, expected[np.isin(expected, found)] if may_lack else expected)


def _num_batches(num_studies: int, setting: Setting) -> int:
    return -(-num_studies // setting.batch_size)


def _cut(num_batches: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, num_batches)) for start in range(0, num_batches, step))
