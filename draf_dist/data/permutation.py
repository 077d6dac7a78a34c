"""Keyed permutations: of a few things, of windows of a long sequence, of shards laid end to end (docs/order.md, 1-3)."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from draf_dist.noise import hash64_np

IntArray = NDArray[np.int64]
Value = TypeVar("Value")


def permutation(size: int, key: int) -> IntArray:
    """The permutation of 0 .. size-1 that a key stands for: stable argsort of hash64(key, i), as signed int64."""
    return np.argsort(hash64_np(key, np.arange(size, dtype=np.int64)), kind="stable")


def block_at(position: int, offset: int, window: int, size: int) -> tuple[int, int]:
    """The (start, length) of the block that holds a position, if 0 .. size-1 is cut at offset, offset + window, ...

    0 <= position < size and 0 <= offset < window; the first and the last block may be shorter than window.
    """
    if position < offset:
        return 0, min(offset, size)
    start = offset + (position - offset) // window * window
    return start, min(window, size - start)


@dataclass(frozen=True)
class Line:
    """The shards of an epoch, permuted and laid end to end. Positions are along the line, samples in manifest order.

    ends, starts: int64 (shards,) along the line, in line order; shard: which shard stands there; manifest_starts: its first sample.
    place, manifest_ends: of every shard in manifest order, where it stands, and one past its last sample.
    """

    shard: IntArray
    starts: IntArray
    ends: IntArray
    manifest_starts: IntArray
    place: IntArray
    manifest_ends: IntArray

    @classmethod
    def of(cls, shard_sizes: tuple[int, ...], key: int) -> "Line":
        """The line of the shards permuted by a key."""
        sizes = np.array(shard_sizes, np.int64)
        shard = permutation(len(sizes), key)
        ends, manifest_ends = np.cumsum(sizes[shard]), np.cumsum(sizes)
        place = np.empty_like(shard)
        place[shard] = np.arange(len(shard))
        return cls(shard, ends - sizes[shard], ends, (manifest_ends - sizes)[shard], place, manifest_ends)

    def samples(self, positions: IntArray) -> IntArray:
        """The samples at positions of the line."""
        # "right" passes over empty shards: the first end beyond the position.
        place = np.searchsorted(self.ends, positions, side="right")
        return self.manifest_starts[place] + positions - self.starts[place]

    def positions(self, samples: IntArray) -> IntArray:
        """Where samples stand in the line; the inverse of `samples`."""
        place = self.place[np.searchsorted(self.manifest_ends, samples, side="right")]
        return self.starts[place] + samples - self.manifest_starts[place]


class Recent(Generic[Value]):
    """The latest values computed, up to a number of them; safe to ask from several threads."""

    def __init__(self, max_values: int) -> None:
        self.max_values = max_values
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Recent[Value]"], tuple[int]]:
        # A lock can't cross a process boundary, and what is remembered need not.
        return type(self), (self.max_values,)

    def get(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of a key; two threads that both miss it compute the same."""
        with self._lock:
            if key in self._values:
                return self._values[key]
        value = compute()
        with self._lock:
            self._values[key] = value
            while len(self._values) > self.max_values:
                self._values.popitem(last=False)
        return value
