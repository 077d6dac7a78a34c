"""One process's part of a job in a node cache: finds blocks, has them made, says what is needed and until when."""

import heapq
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, cast

from draf_dist.data import node_cache_entries as entries
from draf_dist.data.node_cache_folder import PATIENCE_S, Block, BlockKey, CacheFolder, HeldError, LiveLease, explained, say_step
from draf_dist.data.node_cache_holds import Hold
from draf_dist.data.node_cache_index import BlockIndex

if TYPE_CHECKING:
    from typing_extensions import Buffer

Fetch = Callable[[Sequence[BlockKey]], "Sequence[Buffer]"]

# Descriptors that a lease keeps; beside them, only the blocks that callers hold are open.
OPEN_BLOCKS = 256


@dataclass
class CacheStats:
    """What one lease has met so far, in blocks unless it says bytes. A block that is asked for again counts again."""

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0
    waited: int = 0
    """Fetched by another thread or process while we waited."""
    evicted: int = 0
    evicted_bytes: int = 0
    over_limit_bytes: int = 0
    """The most that the cache was above its limit because nothing else could go; 0 unless a job needs more than it said."""


class Lease:
    """Made by NodeCache.lease; safe for many threads. Ends with close(), or with the process."""

    def __init__(self, files: CacheFolder, index: BlockIndex, limit_bytes: int, said: LiveLease, hold: Hold) -> None:
        self._files, self._index, self._limit_bytes = files, index, limit_bytes
        self._said, self._hold = said, hold
        self._generation = index.generation
        self._lock = threading.Lock()
        self._open: OrderedDict[BlockKey, Block] = OrderedDict()
        # Until when the index knows us to need what, and the same by that step (with entries that a later one has replaced).
        self._until: dict[BlockKey, int] = {}
        self._ends: list[tuple[int, BlockKey]] = []
        self._stats = CacheStats()
        # Fetches of other processes, perhaps stopped ones, that were waited for long enough.
        self._stuck: set[str] = set()
        self._is_past = False
        self._is_closed = False

    @property
    def stats(self) -> CacheStats:
        """What has happened so far."""
        with self._lock:
            return replace(self._stats)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """This process needs nothing any more. Blocks that were handed out stay readable."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._open.clear()
                self._files.end_lease(self._hold)

    def get(self, keys: Sequence[BlockKey], until: Sequence[int], fetch: Fetch) -> list[Block]:
        """The blocks, in the order of their keys; until: the last step of this job that needs each.

        fetch(keys) makes those that no process has or is making, in the order in which they were asked for. What it raises is
        raised here, and nothing is kept of it; others who wait then fetch for themselves. Where another process is stopped while it
        fetches, or while it has the folder locked, it is waited for PATIENCE_S; then what is missing is fetched past the cache.

        Raises:
            StorageFullError: the disk is full, and nothing more may be evicted.
            UnreachableError: the disk does not answer.
        """
        with self._lock:
            self._check_open()
            blocks = [self._recent(key, step) for key, step in zip(keys, until, strict=True)]
            if None not in blocks:
                self._stats.hits += len(blocks)
                return cast(list[Block], blocks)
        wanted: dict[BlockKey, int] = {}
        for (content, number), step in zip(keys, until, strict=True):
            key = (content, int(number))  # numpy's integers mean nothing to the index
            wanted[key] = max(int(step), wanted.get(key, int(step)))
        found = self._reopened(wanted)
        self._complete(found, wanted, fetch)
        return [found[key] for key in keys]

    def there(self, until: Mapping[BlockKey, int]) -> dict[BlockKey, Block]:
        """Those blocks that need not be fetched, of however many, at the price of one question; until: as in `get`.

        Raises:
            UnreachableError: the disk does not answer.
        """
        with self._lock:
            self._check_open()
            recent = {key: block for key, step in until.items() if (block := self._recent(key, step))}
            self._stats.hits += len(recent)
        wanted = {(content, int(number)): int(step) for (content, number), step in until.items() if (content, number) not in recent}
        found = self._reopened(wanted)
        if others := {key: step for key, step in wanted.items() if key not in found}:
            found |= self._lying(others)
        return recent | found

    def advance(self, step: int) -> None:
        """This process needs nothing any more whose `until` is below step. Costs neither lock nor index."""
        with self._lock:
            self._check_open()
            self._said = replace(self._said, step=int(step))
            say_step(self._hold, self._said.step)
            while self._ends and self._ends[0][0] < step:
                end, key = heapq.heappop(self._ends)
                if self._until.get(key) == end:
                    del self._until[key]
                    # An open descriptor would keep the room of a block that is evicted.
                    self._open.pop(key, None)

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """The blocks turned out to be damaged: they are dropped, so that they are fetched anew.

        One that another process has dropped and fetched meanwhile is left alone, and only opened again.
        """
        with self._lock:
            seen = {key: self._open.pop(key, None) for key in keys}
            for key in seen:
                self._until.pop(key, None)

        def drop(connection: entries.Connection) -> None:
            for key, block in seen.items():
                entries.forget(connection, self._files, key, None if block is None else block.inode)

        with explained(self._files.root), suppress(HeldError):
            self._count_freed(self._index.run_with_room(drop)[1])

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("the lease is closed")

    def _recent(self, key: BlockKey, step: int) -> Block | None:
        """The open block, if the index knows us to need it so long. The lock must be held."""
        block = self._open.get(key)
        if block is None or self._until.get(key, step - 1) < step:
            return None
        self._open.move_to_end(key)
        return block

    def _reopened(self, wanted: Mapping[BlockKey, int]) -> dict[BlockKey, Block]:
        """Those that the index knows us to need: nobody evicts them, so it need not be asked."""
        with self._lock, explained(self._files.root):
            known = [key for key, step in wanted.items() if self._until.get(key, step - 1) >= step]
            found = {key: block for key in known if (block := self._open.get(key) or self._files.open_block(key))}
            self._keep(found)
            self._stats.hits += len(found)
        return found

    def _lying(self, until: Mapping[BlockKey, int]) -> dict[BlockKey, Block]:
        def work(connection: entries.Connection) -> dict[BlockKey, Block]:
            self._catch_up(connection)
            return entries.there(connection, self._files, self._said.name, until)

        try:
            with explained(self._files.root):
                lying, freed = self._index.run_with_room(work)
        except HeldError:
            return {}  # `get` finds it so too, and helps itself
        with self._lock:
            self._needed({key: until[key] for key in lying})
            self._keep(lying)
            self._stats.hits += len(lying)
        self._count_freed(freed)
        return lying

    def _complete(self, found: dict[BlockKey, Block], wanted: Mapping[BlockKey, int], fetch: Fetch) -> None:
        """Fetches what nobody has; then, only then, waits for what others make: so no two callers wait for each other."""
        waited = False
        while missing := {key: step for key, step in wanted.items() if key not in found}:
            try:
                claim = self._claim(missing)
            except HeldError as error:
                self._warn_past(str(error))
                found.update(self._past(list(missing), fetch(list(missing))))
                return
            found.update(claim.found)
            with self._lock:
                self._stats.waited += len(claim.found) if waited else 0
                self._stats.hits += 0 if waited else len(claim.found)
            if claim.hold is not None:
                found.update(self._made(claim.hold, claim.mine, fetch))
            elif stuck := [key for key, other in claim.awaited.items() if other in self._stuck]:
                found.update(self._past(stuck, fetch(stuck)))
            elif claim.awaited:
                self._wait_for(min(claim.awaited.values()))
            waited = True

    def _wait_for(self, other: str) -> None:
        if not self._files.wait_for_fetch(other):
            self._stuck.add(other)
            path = self._files.unfinished(other)
            told = f"{path}: another process has been fetching for {PATIENCE_S:.0f} s. It is stopped, or its store does not answer"
            self._warn_past(f"{told}; `fuser {path}` names it: let it go on, or end it.")

    def _past(self, keys: Sequence[BlockKey], data: "Sequence[Buffer]") -> dict[BlockKey, Block]:
        """Blocks of which the cache does not know: there they are as another process will make them, or has left them."""
        with explained(self._files.root):
            blocks = {key: self._files.write_past(content) for key, content in zip(keys, data, strict=True)}
        with self._lock:
            self._stats.misses += len(blocks)
            self._stats.fetched_bytes += sum(block.size for block in blocks.values())
        return blocks

    def _warn_past(self, told: str) -> None:
        with self._lock:
            is_new, self._is_past = not self._is_past, True
        if is_new:
            warnings.warn(f"{told} Meanwhile what is missing is fetched past the cache.", RuntimeWarning, stacklevel=2)

    def _claim(self, missing: Mapping[BlockKey, int]) -> entries.Claim:
        begun: list[Hold] = []

        def take_back() -> None:
            while begun:
                self._files.end_fetch(begun.pop())

        def work(connection: entries.Connection) -> entries.Claim:
            take_back()  # of an attempt that failed
            self._catch_up(connection)
            claim = entries.claim(connection, self._files, self._said.name, missing)
            begun.extend([claim.hold] if claim.hold else ())
            return claim

        try:
            with explained(self._files.root):
                claim, freed = self._index.run_with_room(work)
        except BaseException:
            take_back()
            raise
        with self._lock:
            self._needed(missing)
            self._keep(claim.found)
        self._count_freed(freed)
        return claim

    def _catch_up(self, connection: entries.Connection) -> None:
        """Where the index is another than before, maybe the whole folder is: says again what we need."""
        if self._generation == self._index.generation:
            return
        with self._lock:
            if not (self._is_closed or self._hold.path.exists()):
                self._hold = self._files.new_lease(self._said)
            known = dict(self._until)
        entries.need_again(connection, self._said.name, known)
        self._generation = self._index.generation

    def _made(self, hold: Hold, keys: Sequence[BlockKey], fetch: Fetch) -> dict[BlockKey, Block]:
        try:
            data = dict(zip(keys, fetch(keys), strict=True))
            with explained(self._files.root):
                blocks = self._published(hold, data)
        except HeldError as error:
            # What lies there half-published is cleared up by the next one who asks.
            self._warn_past(str(error))
            return self._past(keys, list(data.values()))
        except BaseException:
            # Where even this fails, the next one who asks finds the fetch dead and clears up.
            with suppress(OSError, HeldError):
                self._index.run(lambda connection: entries.abandon(connection, self._files, hold.path.name))
            raise
        finally:
            # Last: whoever waits must then find either the blocks or nothing.
            self._files.end_fetch(hold)
        with self._lock:
            self._keep(blocks)
            self._stats.misses += len(blocks)
            self._stats.fetched_bytes += sum(block.size for block in blocks.values())
        return blocks

    def _published(self, hold: Hold, data: "Mapping[BlockKey, Buffer]") -> dict[BlockKey, Block]:
        """Books the bytes and makes room before anything is written, so that the limit holds at any moment."""
        fetch = hold.path.name
        sizes = {key: memoryview(content).nbytes for key, content in data.items()}

        def reserve(connection: entries.Connection) -> entries.Freed:
            entries.reserve(connection, fetch, sizes)
            return entries.make_room(connection, self._files, self._limit_bytes)

        room, freed = self._index.run_with_room(reserve)
        self._count_freed(room, freed)
        blocks = {key: self._written(hold, key, content) for key, content in data.items()}
        _, freed = self._index.run_with_room(lambda connection: entries.publish(connection, fetch))
        self._count_freed(freed)
        return blocks

    def _written(self, hold: Hold, key: BlockKey, content: "Buffer") -> Block:
        size = memoryview(content).nbytes
        block, freed = self._index.with_room(size, lambda: self._files.write_block(hold, key, content))
        self._count_freed(freed)
        return block

    def _needed(self, until: Mapping[BlockKey, int]) -> None:
        """The index knows now that we need these. The lock must be held."""
        for key, step in until.items():
            self._until[key] = max(step, self._until.get(key, step))
            heapq.heappush(self._ends, (self._until[key], key))

    def _keep(self, blocks: Mapping[BlockKey, Block]) -> None:
        """Keeps the descriptors used last. The lock must be held."""
        if self._is_closed:
            return
        for key, block in blocks.items():
            self._open[key] = block
            self._open.move_to_end(key)
        while len(self._open) > OPEN_BLOCKS:
            self._open.popitem(last=False)

    def _count_freed(self, *more: entries.Freed) -> None:
        with self._lock:
            was_over = self._stats.over_limit_bytes
            for freed in more:
                self._stats.evicted += freed.blocks
                self._stats.evicted_bytes += freed.size_bytes
                self._stats.over_limit_bytes = max(self._stats.over_limit_bytes, freed.over_bytes)
            is_new = self._stats.over_limit_bytes and not was_over
        if is_new:
            # Not an error: the job would end for a bound that is a few blocks off, or wait for room that only it could make.
            told = f"{self._files.root}: the jobs on this node need more than they said; the cache exceeds its limit for now"
            warnings.warn(told, RuntimeWarning, stacklevel=2)
