"""Ranks that read a release through the cache of their node, in this process or in ones of their own, and what they have read."""

import hashlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import numpy as np
from batches import tensors

from draf_dist.data.bad_data import BadData, LeftOut
from draf_dist.data.loader import Loader, Reading
from draf_dist.data.loader_stats import LoaderStats
from draf_dist.data.node_cache import NodeCache
from draf_dist.data.order import Order
from draf_dist.data.receipts import receipt
from draf_dist.data.release import Release, open_release
from draf_dist.schema.batch import Batch
from draf_dist.schema.release import Receipt

# Importing takes seconds; a process that is forked off one which has imported, and has used no store, has it for nothing.
PROCESSES = multiprocessing.get_context("forkserver")
# Of the tests folder nothing: the path to it is not known there yet.
PROCESSES.set_forkserver_preload(["draf_dist.data.loader", "draf_dist.storage", "aiobotocore.session", "aiohttp"])
Rows = list[tuple[int, str]]


@dataclass(frozen=True)
class Reader:
    """How a rank reads. block_bytes: in processes; 0 leaves it as it is."""

    url: str
    cache: Path
    limit_bytes: int = 10**9
    rank: int = 0
    world: int = 1
    threads: int = 2
    prefetch: int = 4
    batch_size: int = 48
    groups: int = 8
    open_samples: int = 256
    seed: int = 3
    block_bytes: int = 0
    bad_data: BadData = BadData()

    def order(self, release: Release) -> Order:
        sizes = tuple(shard.num_samples for shard in release.shards("train"))
        return Order(sizes, release.version, self.seed, self.batch_size, groups=self.groups, open_samples=self.open_samples)

    def loader(self, release: Release) -> Loader:
        cache = NodeCache(self.cache, self.limit_bytes)
        order = self.order(release)
        # Readers of one order are the ranks of one run.
        reading = Reading(prefetch=self.prefetch, bad_data=self.bad_data, cache=cache, job=repr(order))
        return Loader(release, "train", order, rank=self.rank, world=self.world, threads=self.threads, reading=reading)


@dataclass
class Seen:
    """What ranks were handed. rows: step -> (uid, digest of its row in every tensor) of each sample, padding left out.

    num_rows: step -> rows with padding, of every rank that got this step. stats: of all loaders. left_out: by them.
    """

    rows: dict[int, Rows] = field(default_factory=dict)
    num_rows: dict[int, list[int]] = field(default_factory=dict)
    stats: LoaderStats = LoaderStats()
    left_out: list[LeftOut] = field(default_factory=list)

    def add(self, step: int, batch: Batch) -> None:
        self.rows.setdefault(step, []).extend(digests(batch))
        self.num_rows.setdefault(step, []).append(batch.num_rows)

    def join(self, other: "Seen") -> None:
        for step, rows in other.rows.items():
            self.rows.setdefault(step, []).extend(rows)
            self.num_rows.setdefault(step, []).extend(other.num_rows[step])
        self.stats += other.stats
        self.left_out += other.left_out

    def global_batch(self, step: int) -> Rows:
        return sorted(self.rows[step])

    def receipt(self, steps: range) -> Receipt:
        return receipt(np.array([uid for step in steps for uid, _ in self.rows.get(step, ())], dtype=np.int64))


def digests(batch: Batch) -> Rows:
    """(uid, digest of its row in every tensor) of every sample."""
    columns = [np.ascontiguousarray(tensor.numpy()).reshape(batch.num_rows, -1).view(np.uint8) for tensor in tensors(batch)]
    rows = np.concatenate(columns, axis=1)
    weight, uids = batch.weight.tolist(), batch.uid.tolist()
    return [(uids[row], hashlib.blake2b(rows[row], digest_size=8).hexdigest()) for row in range(batch.num_rows) if weight[row] > 0]


def read(reader: Reader, release: Release, steps: range) -> Seen:
    """What this one rank is handed."""
    seen, loader = Seen(), reader.loader(release)
    for step, batch in loader.batches(steps.start, steps.stop):
        seen.add(step, batch)
    seen.stats = loader.stats()
    return seen


def read_by_all(reader: Reader, release: Release, steps: range) -> Seen:
    """What all ranks are handed, which go from step to step together."""
    together = Seen()
    loaders = [replace(reader, rank=rank).loader(release) for rank in range(reader.world)]
    for handed in zip(*(loader.batches(steps.start, steps.stop) for loader in loaders), strict=True):
        for step, batch in handed:
            together.add(step, batch)
    for loader in loaders:
        together.stats += loader.stats()
    return together


# In processes


def work(reader: Reader, steps: range, environment: Mapping[str, str], pipe: Any, gate: Any) -> None:
    """Reads as a rank, telling every step; ends with what it has seen or the error. gate: where all ranks meet at every step."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if reader.block_bytes:
        from draf_dist.data import loader, remote_shards

        loader.BLOCK_BYTES = remote_shards.BLOCK_BYTES = reader.block_bytes
    seen = Seen()
    try:
        made = reader.loader(open_release(reader.url))
        for step, batch in made.batches(steps.start, steps.stop):
            seen.add(step, batch)
            pipe.send(step)
            if gate is not None:
                with suppress(BrokenBarrierError):
                    gate.wait(WAIT_S)
        seen.stats = made.stats()
    except Exception as error:  # noqa: BLE001 - whatever it is, the test has to hear of it
        pipe.send(error)
        return
    pipe.send(seen)


WAIT_S = 60.0


class RankProcess:
    """A rank in a process of its own."""

    def __init__(self, reader: Reader, steps: range, gate: Any = None) -> None:
        self._pipe, theirs = PROCESSES.Pipe()
        names = ("AWS_", "DRAF_", "OMP_")
        environment = {name: value for name, value in os.environ.items() if name.startswith(names)}
        self.process = PROCESSES.Process(target=work, args=(reader, steps, environment, theirs, gate), daemon=True)
        self.process.start()
        theirs.close()
        self.last_step = -1
        # What it tells is taken at once: a rank that can't tell does not go on.
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def wait_for_step(self, step: int, timeout_s: float = WAIT_S) -> None:
        until = time.monotonic() + timeout_s
        while self.last_step < step:
            found = self._next(until)
            assert isinstance(found, int), f"it ended at step {self.last_step}: {found}"

    def result(self, timeout_s: float = WAIT_S) -> Seen:
        """What it has seen; raises what it has raised."""
        until = time.monotonic() + timeout_s
        while isinstance(found := self._next(until), int):
            pass
        self.process.join(timeout_s)
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, Seen)
        return found

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(WAIT_S)

    def _next(self, until: float) -> Any:
        try:
            found = self._told.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError(f"a rank is silent after step {self.last_step}") from None
        self.last_step = found if isinstance(found, int) else self.last_step
        return found

    def _listen(self) -> None:
        try:
            while True:
                self._told.put(self._pipe.recv())
        except EOFError:
            self._told.put(EOFError("a rank has ended"))


@contextmanager
def ranks(reader: Reader, steps: range, *, lockstep: bool = False) -> Iterator[list[RankProcess]]:
    """reader.world processes; what is still alive at the end is killed. lockstep: all meet at every step."""
    gate = PROCESSES.Barrier(reader.world) if lockstep else None
    started = [RankProcess(replace(reader, rank=rank), steps, gate) for rank in range(reader.world)]
    try:
        yield started
    finally:
        for rank in started:
            if rank.process.is_alive():
                rank.kill()


def read_by_processes(reader: Reader, steps: range, *, lockstep: bool = False, timeout_s: float = WAIT_S) -> Seen:
    """What all ranks are handed."""
    together = Seen()
    with ranks(reader, steps, lockstep=lockstep) as started:
        for seen in results(started, timeout_s):
            together.join(seen)
    return together


def results(started: Sequence[RankProcess], timeout_s: float = WAIT_S) -> list[Seen]:
    return [rank.result(timeout_s) for rank in started]
