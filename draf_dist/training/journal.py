"""Append-only files of JSON lines on any store."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from draf_dist.errors import DataError, explain
from draf_dist.storage import Store
from draf_dist.storage.local import NO_ROOM, full

Line = dict[str, Any]


class Journal:
    """A .jsonl file. Lines are in the file at the latest after `flush`.

    A local file grows by appending, so that a run can be watched; on a remote store, where nothing can be appended, the whole file
    is written at every flush, so its bytes are kept here. One thread appends, any may flush. Opening one puts a new file in the
    place of the old: an older attempt that still runs appends to a file that nobody sees.
    """

    def __init__(self, store: Store, path: str, wanted: Callable[[Line], bool] = lambda line: True) -> None:
        """wanted: which of the lines that are there stay."""
        self._store, self._path = store, path
        self._content = bytearray().join(_encoded(line) for line in read_lines(store, path) if wanted(line))
        self._unwritten = False
        self._flushing = threading.Lock()
        self._write_all()
        self._local = store.local_path(path)
        # Without a buffer: on a full disk closing would try, and fail, to write it once more.
        self._file = None if self._local is None else self._local.open("ab", buffering=0)

    @property
    def lines(self) -> tuple[Line, ...]:
        """Everything in the file, oldest first; decoded anew at every call."""
        return tuple(json.loads(line) for line in self._content.splitlines())

    def append(self, line: Line) -> None:
        """Adds one line; NaN is refused because it is no JSON."""
        data = _encoded(line)
        self._content += data
        self._unwritten = True
        if self._file is not None and self._local is not None:
            with room(self._local.parent):
                if self._file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        """Makes everything appended so far durable."""
        with self._flushing:
            if not self._unwritten:
                return
            # What is appended meanwhile is written now or asks for another flush.
            self._unwritten = False
            try:
                self._make_durable()
            except BaseException:
                self._unwritten = True
                raise

    def close(self) -> None:
        """Lets go of the file."""
        if self._file is not None:
            self._file.close()

    def _make_durable(self) -> None:
        if self._file is not None and self._local is not None:
            with room(self._local.parent):
                os.fsync(self._file.fileno())
        else:
            self._write_all()

    def _write_all(self) -> None:
        # A copy: it can't grow while somebody looks at it.
        self._store.write(self._path, bytes(self._content))


def _encoded(line: Line) -> bytes:
    return f"{json.dumps(line, allow_nan=False)}\n".encode()


def read_lines(store: Store, path: str) -> list[Line]:
    """The lines of a journal; none where there is no file. A last line that a kill cut short is left out.

    Raises:
        DataError: another line is no JSON.
    """
    if not store.exists(path):
        return []
    text = store.read(path).decode("utf-8", errors="replace")
    whole, _, _ = text.rpartition("\n")
    lines: list[Line] = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            where, remedy = f"{store.where(path)} line {number}", "Take the line out, or start anew with --fresh."
            raise DataError(explain(where, expected="a JSON object", found=error.msg, remedy=remedy)) from error
    return lines


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """Says that the disk of a folder is full, where that is what stops a write.

    Raises:
        StorageFullError: no room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise full(str(folder), folder) from error
