"""Shards on a local disk: memory-mapped, so that reading is slicing."""

import mmap
import threading
from pathlib import Path

from draf_dist.data.shard_reader import ShardReader

# A map keeps a file open; the usual limit of a process is 1,024.
OPEN_MAPS = 256


class LocalShards:
    """Reads members of a reader's shards. Safe for several threads; a view stays valid whatever is closed meanwhile."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._views: dict[int, memoryview] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int) -> memoryview:
        """Bytes [offset, offset + size), unchecked.

        Raises:
            DataError: the shard is gone or has not the size that the manifest says.
        """
        # Without the lock: a dict is safe to look into, and this is asked for every member.
        view = self._views.get(shard)
        if view is None:
            view = self._open(shard)
        return view[offset : offset + size]

    def read_again(self, shard: int, offset: int, size: int) -> memoryview:
        """The same: there is no copy on the way that could be at fault."""
        return self.read(shard, offset, size)

    def _open(self, shard: int) -> memoryview:
        with self._lock:
            if shard not in self._views:
                while len(self._views) >= OPEN_MAPS:
                    del self._views[next(iter(self._views))]
                self._views[shard] = self._map(shard)
            return self._views[shard]

    def _map(self, shard: int) -> memoryview:
        record = self._reader.shards[shard]
        store, path = self._reader.release.tar_location(record)
        file_path = store.local_path(path)
        assert file_path is not None
        try:
            return self._mapped(shard, file_path)
        except OSError as error:
            found = error.strerror or type(error).__name__
            raise self._reader.broken(shard, expected="a shard", found=found) from error

    def _mapped(self, shard: int, path: Path) -> memoryview:
        expected = self._reader.shards[shard].size_bytes
        with path.open("rb") as file:
            # A file that is too short must be found now: reading a map behind its end kills the process.
            size_bytes = path.stat().st_size
            if size_bytes != expected:
                raise self._reader.broken(shard, expected=f"{expected} bytes", found=f"{size_bytes} bytes")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
