"""Shards on a local disk: files that stay open, of which each member is read into memory of its own.

Not mapped: a file that somebody cuts short would then end the process, and every pass would pay for its pages again.
"""

import os
import threading

from draf_dist.data.shard_reader import ShardReader
from draf_dist.errors import DataError

# The usual limit of a process is 1,024.
OPEN_FILES = 256


class LocalShards:
    """Reads members of a reader's shards. Safe for several threads. Files are opened when first read."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._files: dict[int, _File] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size), unchecked; fewer where the file has become shorter meanwhile.

        Raises:
            DataError: the shard is gone, has not the size that the manifest says, or can't be read.
        """
        # Without the lock: a dict is safe to look into, and this is asked for every member.
        file = self._files.get(shard) or self._open(shard)
        try:
            return os.pread(file.descriptor, size, offset)
        except OSError as error:
            raise self._unreadable(shard, error) from error

    def read_again(self, shard: int, offset: int, size: int) -> bytes:
        """The same of the file that lies there now: another may have taken the place of the one that is open."""
        with self._lock:
            self._files.pop(shard, None)
        return self.read(shard, offset, size)

    def _open(self, shard: int) -> "_File":
        with self._lock:
            if shard not in self._files:
                while len(self._files) >= OPEN_FILES:
                    del self._files[next(iter(self._files))]
                self._files[shard] = self._opened(shard)
            return self._files[shard]

    def _opened(self, shard: int) -> "_File":
        record = self._reader.shards[shard]
        store, path = self._reader.release.tar_location(record)
        file_path = store.local_path(path)
        assert file_path is not None
        try:
            file = _File(os.open(file_path, os.O_RDONLY | os.O_CLOEXEC))
            size_bytes = os.fstat(file.descriptor).st_size
        except OSError as error:
            raise self._unreadable(shard, error) from error
        if size_bytes != record.size_bytes:
            raise self._reader.broken(shard, expected=f"{record.size_bytes} bytes", found=f"{size_bytes} bytes")
        return file

    def _unreadable(self, shard: int, error: OSError) -> DataError:
        return self._reader.broken(shard, expected="a shard", found=error.strerror or type(error).__name__)


class _File:
    """An open file, closed with its last user: a thread may still read what another has dropped."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def is_local(reader: ShardReader) -> bool:
    """Whether reading is a matter of memory, without requests."""
    locations = (reader.release.tar_location(shard) for shard in reader.shards)
    return all(store.local_path(path) is not None for store, path in locations)
