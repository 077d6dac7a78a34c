"""Shards in a remote store: blocks of them, fetched ahead of use into the cache of the node.

A step's samples are announced before they are read (`want`), in the order of the steps; their blocks are asked for in that order,
neighbours in one request. A block is held by the cache until the last step of its epoch that needs one of its samples, on any rank.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from draf_dist.data.node_cache import Block, BlockKey, Lease
from draf_dist.data.shard_reader import IntArray, ShardReader, runs
from draf_dist.errors import DataError
from draf_dist.storage import MissingError

BLOCK_BYTES = 2**20
# Neighbouring blocks are asked for together, up to this many in one request.
BLOCKS_PER_REQUEST = 4


class LastUse(Protocol):
    """When samples are drawn for the last time in an epoch of their source; see `order.Plan`."""

    def last_use(self, source: int, epoch: int, samples: IntArray) -> IntArray:
        """A step after which a sample is not drawn any more in that epoch, for each."""
        ...


@dataclass(frozen=True)
class Wanted:
    """Samples of one step and source: their epoch, shard and row in it, int64 (n,) each."""

    step: int
    epoch: IntArray
    shard: IntArray
    row: IntArray


@dataclass(frozen=True)
class _Fresh:
    """A block to be asked for: the first and the last of the announced steps that read it, and the latest epoch in which."""

    first_step: int
    last_step: int
    epoch: int


@dataclass
class _Held:
    """A block that some step from now on needs: one of those that a request brings. epoch: the latest one that wants it.

    came: the block, once somebody has waited for it.
    """

    request: Future[list[Block]]
    place: int
    last_step: int
    epoch: int
    came: Block | None = None


class RemoteShards:
    """Reads members of a reader's shards, of the blocks that were announced. Safe for several threads.

    fetchers: threads that wait for the store. lease: of this process in the node's cache.
    """

    def __init__(self, reader: ShardReader, source: int, plan: LastUse, lease: Lease, fetchers: ThreadPoolExecutor) -> None:
        self._reader, self._source, self._plan = reader, source, plan
        self._lease, self._fetchers = lease, fetchers
        self._held: dict[tuple[int, int], _Held] = {}
        self._lock = threading.Lock()

    def want(self, wanted: Sequence[Wanted]) -> None:
        """Announces what the next steps read; returns once it is on its way.

        Raises:
            UnreachableError: the store does not answer.
        """
        self._load_indexes(sorted({int(shard) for part in wanted for shard in part.shard}))
        steps = [(part.step, self._blocks(part)) for part in wanted]
        last_step = {block: step for step, blocks in steps for block in blocks}
        fresh: dict[tuple[int, int], _Fresh] = {}
        for step, blocks in steps:
            for block, epoch in blocks.items():
                if not self._hold_on(block, epoch, step):
                    first = fresh[block].first_step if block in fresh else step
                    fresh[block] = _Fresh(first, last_step[block], epoch)
        self._request(fresh)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a shard that was announced, unchecked; waits for them.

        Raises:
            DataError: the shard is gone, or ends before.
            UnreachableError: the store does not answer.
        """
        first, last = offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES
        held = self._held.get((shard, first))
        if first == last and held is not None and held.came is not None:
            # Nearly always: nothing to wait for, and no lock.
            return held.came.read(offset - first * BLOCK_BYTES, offset + size - first * BLOCK_BYTES)
        if any((shard, block) not in self._held for block in range(first, last + 1)):
            # Its index could not be read when its step was announced, and now it could.
            return self._read_store(shard, offset, size)
        try:
            parts = [self._read_block(shard, block, offset, offset + size) for block in range(first, last + 1)]
        except DataError:
            # A neighbour that came with it may be what is missing.
            return self._read_store(shard, offset, size)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_again(self, shard: int, offset: int, size: int) -> bytes:
        """The same straight from the store; what the cache holds of it is dropped.

        Raises as `read`.
        """
        first, last = offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES
        self._lease.forget([self._key(shard, block) for block in range(first, last + 1)])
        return self._read_store(shard, offset, size)

    def done(self, step: int) -> None:
        """Says that this step and those before it have read what they wanted."""
        with self._lock:
            for block in [block for block, held in self._held.items() if held.last_step <= step]:
                del self._held[block]

    def _load_indexes(self, shards: Sequence[int]) -> None:
        # All at once: one after the other they would cost a round trip each before the first block is asked for.
        missing = [shard for shard in shards if not self._reader.has_index(shard)]
        for request in [self._fetchers.submit(self._reader.index, shard) for shard in missing]:
            # What is wrong with an index is told where its samples are read.
            with suppress(DataError):
                request.result()

    def _blocks(self, part: Wanted) -> dict[tuple[int, int], int]:
        """(shard, block) -> the latest epoch of this step that reads it, in the order of the rows."""
        found: dict[tuple[int, int], int] = {}
        spans: dict[int, Iterator[tuple[int, int]]] = {}
        for shard in set(part.shard.tolist()):
            with suppress(DataError):
                start, stop = self._reader.index(shard).extents
                rows = part.row[part.shard == shard]
                first_blocks, last_blocks = start[rows] // BLOCK_BYTES, (stop[rows] - 1) // BLOCK_BYTES
                spans[shard] = zip(first_blocks.tolist(), last_blocks.tolist(), strict=True)
        for shard, epoch in zip(part.shard.tolist(), part.epoch.tolist(), strict=True):
            if shard in spans:
                first, last = next(spans[shard])
                for block in range(first, last + 1):
                    found[shard, block] = max(epoch, found.get((shard, block), epoch))
        return found

    def _hold_on(self, block: tuple[int, int], epoch: int, step: int) -> bool:
        """Whether the block is held for this epoch already; then it is held up to the step too."""
        with self._lock:
            held = self._held.get(block)
            if held is None or held.epoch < epoch:
                return False
            held.last_step = max(held.last_step, step)
            return True

    def _request(self, fresh: dict[tuple[int, int], _Fresh]) -> None:
        """Sends for blocks: those that the first step needs first."""
        until = self._until({block: wanted.epoch for block, wanted in fresh.items()})
        there = self._lease.there({self._key(*block): until[block] for block in fresh})
        of_shard: dict[int, list[int]] = {}
        for shard, block in sorted(fresh):
            if (kept := there.get(self._key(shard, block))) is None:
                of_shard.setdefault(shard, []).append(block)
            else:
                self._hold([(shard, block)], fresh, _done([kept]))
        requests = [(shard, run) for shard, blocks in of_shard.items() for run in runs(blocks, BLOCKS_PER_REQUEST)]
        requests.sort(key=lambda request: min(fresh[request[0], block].first_step for block in request[1]))
        for shard, run in requests:
            request = self._fetchers.submit(self._fetch, shard, run, [until[shard, block] for block in run])
            self._hold([(shard, block) for block in run], fresh, request)

    def _hold(self, blocks: Sequence[tuple[int, int]], fresh: dict[tuple[int, int], _Fresh], request: Future[list[Block]]) -> None:
        with self._lock:
            for place, block in enumerate(blocks):
                self._held[block] = _Held(request, place, fresh[block].last_step, fresh[block].epoch)

    def _until(self, epochs: dict[tuple[int, int], int]) -> dict[tuple[int, int], int]:
        """The last step that needs a sample of each block, in the block's epoch."""
        until: dict[tuple[int, int], int] = {}
        for epoch in set(epochs.values()):
            blocks = [block for block, wanted in epochs.items() if wanted == epoch]
            samples = [self._samples_in(*block) for block in blocks]
            steps = self._plan.last_use(self._source, epoch, np.concatenate(samples))
            ends = np.cumsum([len(part) for part in samples])
            until |= {block: int(part.max()) for block, part in zip(blocks, np.split(steps, ends[:-1]), strict=True)}
        return until

    def _samples_in(self, shard: int, block: int) -> IntArray:
        """The samples of which some byte lies in a block."""
        start, stop = self._reader.index(shard).extents
        inside = (start < (block + 1) * BLOCK_BYTES) & (stop > block * BLOCK_BYTES)
        return self._reader.sample_number(shard, 0) + np.flatnonzero(inside)

    def _fetch(self, shard: int, run: range, until: Sequence[int]) -> list[Block]:
        return self._lease.get([self._key(shard, block) for block in run], until, lambda keys: self._fetch_missing(shard, keys))

    def _fetch_missing(self, shard: int, keys: Sequence[BlockKey]) -> list[memoryview]:
        """Ascending blocks of a shard, neighbours in one request."""
        size = self._reader.shards[shard].size_bytes
        parts = runs([block for _, block in keys], BLOCKS_PER_REQUEST)
        ranges = [(part.start * BLOCK_BYTES, min(part.stop * BLOCK_BYTES, size)) for part in parts]
        found: list[memoryview] = []
        for (start, stop), answer in zip(ranges, self._read_ranges(shard, ranges), strict=True):
            found += [answer[at : at + BLOCK_BYTES] for at in range(0, stop - start, BLOCK_BYTES)]
        return found

    def _read_ranges(self, shard: int, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        record = self._reader.shards[shard]
        store, path = self._reader.release.tar_location(record)
        try:
            answers = [memoryview(answer) for answer in store.read_ranges(path, ranges)]
        except MissingError as error:
            raise self._reader.broken(shard, expected="a shard", found="nothing") from error
        for (start, stop), answer in zip(ranges, answers, strict=True):
            if len(answer) != stop - start:
                found = f"an end after {start + len(answer)}" if len(answer) else f"an end before {start}"
                raise self._reader.broken(shard, expected=f"{record.size_bytes} bytes", found=found)
        return answers

    def _read_store(self, shard: int, offset: int, size: int) -> bytes:
        return bytes(self._read_ranges(shard, [(offset, offset + size)])[0])

    def _read_block(self, shard: int, block: int, start: int, stop: int) -> bytes:
        """What lies in the block of bytes [start, stop) of the shard."""
        held = self._held[shard, block]
        origin = block * BLOCK_BYTES
        held.came = held.request.result()[held.place]
        return held.came.read(max(start - origin, 0), min(stop - origin, BLOCK_BYTES))

    def _key(self, shard: int, block: int) -> BlockKey:
        return self._reader.shards[shard].sha256, block


def _done(blocks: list[Block]) -> Future[list[Block]]:
    request: Future[list[Block]] = Future()
    request.set_result(blocks)
    return request
