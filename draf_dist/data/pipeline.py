"""Rows to be read -> batches, in order: announced, fetched, decoded, handed out; each runs ahead by a bounded number of steps."""

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice

import numpy as np

from draf_dist.data.arena import Arena
from draf_dist.data.collate import Frame
from draf_dist.data.filler import Filler, Patches, Rows
from draf_dist.data.node_cache import Lease
from draf_dist.data.remote_shards import LastUse, RemoteShards, Wanted
from draf_dist.data.sample import Members
from draf_dist.data.shard_reader import ShardReader
from draf_dist.schema.batch import Batch

# Requests to a store wait for the network, not for the processor: 16 of 1 MiB at 50 ms each fill 2.5 Gbit/s.
FETCH_THREADS = 16
# Several chunks a thread: the last one to finish holds the batch up for less.
CHUNKS_PER_THREAD = 4
# A request to a store that does not answer is repeated for minutes. Whoever ends a pass does not wait so long: its threads end
# when their requests do, and nothing that they still do is seen by anyone.
LEAVING_S = 2.0
# Steps whose blocks are on their way before they are decoded.
AHEAD_STEPS = 16


def reach(prefetch: int) -> int:
    """How many steps beyond the one that is handed out may have blocks in the cache."""
    return prefetch + 1 + AHEAD_STEPS


@dataclass(frozen=True)
class Workshop:
    """What a pass over a plan works with. lease: in the cache of the node; None where all shards are local."""

    filler: Filler
    plan: LastUse
    arena: Arena
    threads: int
    prefetch: int
    lease: Lease | None


def in_order(requests: Iterator[Rows], workshop: Workshop) -> Generator[tuple[int, Batch], None, None]:
    """The batches in the order they were asked for, at most prefetch + 1 of them in the making. Closing it ends its threads."""
    with _Workers(workshop) as workers:
        announcer = _Announcer(requests, workers)
        jobs: deque[_Job] = deque()
        while True:
            while len(jobs) <= workshop.prefetch and (announced := announcer.next()) is not None:
                jobs.append(workers.start(announced))
            if not jobs:
                return
            job = jobs.popleft()
            batch = job.result()
            workers.done(job.step)
            yield job.step, batch


@dataclass(frozen=True)
class _Announced:
    """Rows whose blocks are asked for once `sent` is done; None where there is nothing to fetch."""

    rows: Rows
    sent: Future[None] | None


class _Announcer:
    """Takes steps off the plan: where shards are remote, several ahead of decoding, so that neighbours can be fetched together."""

    def __init__(self, requests: Iterator[Rows], workers: "_Workers") -> None:
        self._requests, self._workers = requests, workers
        self._announced: deque[_Announced] = deque()
        self._began = False

    def next(self) -> _Announced | None:
        """The next step; None at the end."""
        if not self._workers.is_remote:
            self._announce(1 - len(self._announced))
        elif not self._began:
            # The first batch is waited for: nothing comes before its blocks.
            self._announce(1)
            self._announce(AHEAD_STEPS)
        elif len(self._announced) <= AHEAD_STEPS // 2:
            self._announce(AHEAD_STEPS - len(self._announced))
        self._began = True
        return self._announced.popleft() if self._announced else None

    def _announce(self, num: int) -> None:
        stride = list(islice(self._requests, num))
        if stride:
            sent = self._workers.announce(stride)
            self._announced.extend(_Announced(rows, sent) for rows in stride)


class _Workers:
    """The threads of one pass: one that plans, those that wait for the store, those that decode. Leaving ends them."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self._stopped = threading.Event()
        self._decoders = ThreadPoolExecutor(workshop.threads, thread_name_prefix="decode")
        self._fetchers = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan")
        # Patches of volumes have threads of their own: one that waits for its pointer must not keep the pointer's block waiting.
        self._patchers = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="patch")
        self._remote: dict[int, RemoteShards] = {}
        members = [self._open(source, reader) for source, reader in enumerate(workshop.filler.readers)]
        self._sources = workshop.filler.sources(members)

    @property
    def is_remote(self) -> bool:
        """Whether anything has to be fetched."""
        return bool(self._remote)

    def announce(self, stride: Sequence[Rows]) -> Future[None] | None:
        """Begins to fetch what the next steps need."""
        return self._planner.submit(self._want, stride) if self._remote else None

    def start(self, announced: _Announced) -> "_Job":
        """Begins a batch."""
        rows, threads = announced.rows, self._workshop.threads
        frame = Frame(self._workshop.filler.schema, rows.num_rows, self._workshop.arena)
        num_real = len(rows.sample)
        for row in range(num_real, rows.num_rows):
            frame.drop(row)
        size = max(1, -(-num_real // (CHUNKS_PER_THREAD * threads)))
        chunks = [range(start, min(start + size, num_real)) for start in range(0, num_real, size)]
        return _Job(rows.step, frame, [self._submit(frame, announced, chunk) for chunk in chunks])

    def done(self, step: int) -> None:
        """Says that a step is decoded: its blocks are not needed for it any more."""
        for remote in self._remote.values():
            remote.done(step)
        if self._workshop.lease is not None:
            self._workshop.lease.advance(step + 1)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *raised: object) -> None:
        """Drops what has not begun and waits for what has, but not for a store that is silent."""
        self._stopped.set()
        pools = (self._planner, self._fetchers, self._patchers, self._decoders)
        for pool in pools:
            # All are told before any is waited for: a decoder may be waiting for a request that has not begun.
            pool.shutdown(wait=False, cancel_futures=True)
        waiting = threading.Thread(target=_wait_for, args=(pools,), daemon=True)
        waiting.start()
        waiting.join(LEAVING_S)

    def _open(self, source: int, reader: ShardReader) -> Members:
        local = self._workshop.filler.local[source]
        if local is not None:
            return local
        assert self._workshop.lease is not None
        self._remote[source] = RemoteShards(reader, source, self._workshop.plan, self._workshop.lease, self._fetchers)
        return self._remote[source]

    def _want(self, stride: Sequence[Rows]) -> None:
        for source, remote in self._remote.items():
            remote.want([self._wanted(rows, source) for rows in stride])

    def _wanted(self, rows: Rows, source: int) -> Wanted:
        filler, mine = self._workshop.filler, rows.source == source
        samples = filler.samples_read(rows.sample[mine])
        epochs = np.resize(rows.epoch[mine], len(samples))
        return Wanted(rows.step, epochs, *filler.readers[source].locate(samples))

    def _submit(self, frame: Frame, announced: _Announced, chunk: range) -> Future[None]:
        fetches_patches = bool(self._remote) and self._workshop.filler.has_volumes
        patches = self._patchers.submit(self._patches, announced, chunk) if fetches_patches else None
        return self._decoders.submit(self._fill, frame, announced, chunk, patches)

    def _patches(self, announced: _Announced, chunk: range) -> Patches:
        if announced.sent is not None:
            announced.sent.result()
        return self._workshop.filler.patches(announced.rows, chunk, self._sources)

    def _fill(self, frame: Frame, announced: _Announced, chunk: range, patches: Future[Patches] | None) -> None:
        if announced.sent is not None:
            announced.sent.result()
        fetched: Patches = {} if patches is None else patches.result()
        if not self._stopped.is_set():
            self._workshop.filler.fill(frame, announced.rows, chunk, self._sources, fetched)


def _wait_for(pools: Sequence[ThreadPoolExecutor]) -> None:
    for pool in pools:
        pool.shutdown(wait=True)


@dataclass(frozen=True)
class _Job:
    """A batch that is being made."""

    step: int
    frame: Frame
    chunks: list[Future[None]]

    def result(self) -> Batch:
        """Waits for it; raises what went wrong in the first chunk that did."""
        # Once for all of them: whoever wakes for every chunk takes the interpreter from the decoders as often.
        wait(self.chunks)
        for chunk in self.chunks:
            chunk.result()
        return self.frame.batch()
