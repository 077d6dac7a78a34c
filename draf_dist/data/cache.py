"""A bounded cache that several threads share: what is asked for at the same time is made once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


class SharedCache(Generic[KeyT, ValueT]):
    """Keeps the values used last, up to a total size.

    A caller holds the values it was given whatever is evicted meanwhile, so memory is bounded by the limit and by what the
    callers hold.
    """

    def __init__(self, limit: int, size_of: Callable[[ValueT], int]) -> None:
        self._limit, self._size_of = limit, size_of
        self._entries: OrderedDict[KeyT, Future[ValueT]] = OrderedDict()
        self._lock = threading.Lock()
        self.size = 0

    def get(self, keys: Sequence[KeyT], make: Callable[[Sequence[KeyT]], Sequence[ValueT]]) -> list[ValueT]:
        """The values of the keys; make(missing keys) is called once for those that nobody has or is making.

        What make raises is raised to everyone who waited for it, and is not kept: the next caller tries again.
        """
        with self._lock:
            missing = [key for key in dict.fromkeys(keys) if key not in self._entries]
            for key in missing:
                self._entries[key] = Future()
            for key in keys:
                self._entries.move_to_end(key)
            futures = [self._entries[key] for key in keys]
        # First what only this caller makes, then waiting for others: so no two callers wait for each other.
        if missing:
            self._fill(missing, make)
        return [future.result() for future in futures]

    def has(self, key: KeyT) -> bool:
        """Whether the value is there, so that `get` would neither make nor wait for it."""
        with self._lock:
            return key in self._entries and self._entries[key].done()

    def _fill(self, keys: Sequence[KeyT], make: Callable[[Sequence[KeyT]], Sequence[ValueT]]) -> None:
        try:
            values = dict(zip(keys, make(keys), strict=True))
        except BaseException as error:
            # Whatever it was: a thread that waits for these keys must hear of it, or it would wait for ever.
            with self._lock:
                futures = [self._entries.pop(key) for key in keys]
            for future in futures:
                future.set_exception(error)
            raise
        with self._lock:
            for key, value in values.items():
                self._entries[key].set_result(value)
                self.size += self._size_of(value)
            self._evict()

    def _evict(self) -> None:
        for key in list(self._entries):
            if self.size <= self._limit:
                return
            if self._entries[key].done():
                self.size -= self._size_of(self._entries.pop(key).result())
