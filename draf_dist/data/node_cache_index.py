"""The index of a node cache: an SQLite file in which only that is believed which the files cannot say.

Every transaction runs under the lock of the folder, so processes never meet inside SQLite. There is no write-ahead log: its shared
memory would be one more file, and one whose damage can kill a reader.
"""

import errno
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from draf_dist.data.node_cache_entries import SCHEMA, VERSION, Connection, Freed, adopt, evict
from draf_dist.data.node_cache_folder import CacheFolder
from draf_dist.storage.local import NO_ROOM

T = TypeVar("T")

_LOCK_TIMEOUT_S = 30.0
# What says nothing against the file. Everything else does, and it is made anew from the blocks.
_HARMLESS = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT)


class BlockIndex:
    """Runs work in transactions; safe from several threads of the process that made it."""

    def __init__(self, folder: CacheFolder) -> None:
        self._folder, self._process = folder, os.getpid()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._inode: int | None = None
        self.generation = 0
        """Another number means another file: what this process had written down is not in it."""

    def run(self, work: Callable[[Connection], T]) -> T:
        """What work returns, as one transaction under the lock of the folder; done again if the index turns out to be damaged.

        Raises:
            OSError: the disk is full (ENOSPC) or does not answer.
        """
        if os.getpid() != self._process:
            raise ValueError("this node cache was opened in another process; make a new one in this")
        with self._lock, self._folder.locked():
            try:
                return self._attempt(work)
            except sqlite3.DatabaseError as error:
                if _code(error) in _HARMLESS:
                    raise _as_os_error(error) from error
            self._discard()
            try:
                return self._attempt(work)
            except sqlite3.DatabaseError as error:
                raise _as_os_error(error) from error

    def run_with_room(self, work: Callable[[Connection], T]) -> tuple[T, Freed]:
        """Like run, on a disk that may be full: see with_room."""
        return self.with_room(1, lambda: self.run(work))

    def with_room(self, size_bytes: int, act: Callable[[], T]) -> tuple[T, Freed]:
        """What act returns, and what was evicted: so many bytes as often as act finds the disk full, while there are any."""
        freed = Freed()
        while True:
            try:
                return act(), freed
            except OSError as error:
                now = self._evict(max(size_bytes, 1)) if error.errno in NO_ROOM else Freed()
                if not now.blocks:
                    raise
                freed = Freed(freed.blocks + now.blocks, freed.size_bytes + now.size_bytes)

    def _evict(self, size_bytes: int) -> Freed:
        def work(connection: Connection) -> Freed:
            return evict(connection, self._folder, size_bytes)

        try:
            return self.run(work)
        except OSError:
            # The files are gone, but there was no room to write it down. Now there is.
            return self.run(work)

    def _attempt(self, work: Callable[[Connection], T]) -> T:
        connection = self._connected()
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return result

    def _connected(self) -> Connection:
        # Another process may have made it anew, or somebody removed it.
        if self._connection is None or _inode(self._folder.index) != self._inode:
            self._disconnect()
            self._connection = self._connect()
            self._inode = _inode(self._folder.index)
            self.generation += 1
        return self._connection

    def _connect(self) -> Connection:
        self._folder.prepare()
        connection = sqlite3.connect(self._folder.index, timeout=_LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        # Nothing here needs to survive a power cut: no process does, and the files are looked through when the next one comes.
        connection.executescript("PRAGMA journal_mode = PERSIST; PRAGMA synchronous = OFF; PRAGMA temp_store = MEMORY;")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            connection.executescript(SCHEMA)
            adopt(connection, self._folder)
        elif version != VERSION:
            connection.close()
            raise sqlite3.DatabaseError("the index of the cache is of another version")
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _discard(self) -> None:
        self._disconnect()
        for suffix in ("", "-journal"):
            self._folder.index.with_name(self._folder.index.name + suffix).unlink(missing_ok=True)


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino  # noqa: PTH116 - asked in every transaction
    except FileNotFoundError:
        return None


def _code(error: sqlite3.DatabaseError) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF


def _as_os_error(error: sqlite3.DatabaseError) -> OSError:
    is_full = _code(error) == sqlite3.SQLITE_FULL
    return OSError(errno.ENOSPC if is_full else errno.EIO, f"the index of the cache: {error}")
