"""Writing one object in one request, given up when nothing moves.

A limit on the whole request would fail large files on slow links, and aiohttp has none for a server that accepts a connection and
then neither reads nor answers: the content tells when it was last read from.
"""

import asyncio
import io
import os
import time
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as NotYetError
from pathlib import Path
from typing import Any

import s3fs

from draf_dist.storage.retry import Reason, RequestError

_LOOK_S = 0.5


class _Watched:
    """Content that knows when it was last read from."""

    size: int
    read_at: float

    def watch(self, size: int) -> None:
        self.size, self.read_at = size, time.monotonic()


class WatchedBytes(_Watched, io.BytesIO):
    """Content in memory."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.watch(len(data))

    def read(self, size: int | None = -1, /) -> bytes:
        """See io.BytesIO."""
        self.read_at = time.monotonic()
        return super().read(size)


class WatchedView(_Watched, io.RawIOBase):
    """Content in memory that is someone else's: no copy of it is made."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data, self._position = data.cast("B"), 0
        self.watch(len(self._data))

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def seekable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def tell(self) -> int:
        """See io.RawIOBase."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """See io.RawIOBase."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """See io.RawIOBase."""
        self.read_at = time.monotonic()
        stop = self.size if size is None or size < 0 else min(self._position + size, self.size)
        data = bytes(self._data[self._position : stop])
        self._position += len(data)
        return data


class WatchedFile(_Watched, io.FileIO):
    """The content of a file, which is read while it is sent."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self.watch(os.fstat(self.fileno()).st_size)

    def read(self, size: int | None = -1, /) -> bytes:
        """See io.FileIO."""
        self.read_at = time.monotonic()
        return super().read(-1 if size is None else size)


Watched = WatchedBytes | WatchedView | WatchedFile


def put(files: s3fs.S3FileSystem, key: str, content: Watched, stall_timeout_s: float, **options: Any) -> None:
    """One PUT of the content from its beginning; options are those of botocore's put_object.

    Raises:
        RequestError: nothing was read of it for stall_timeout_s. The answer to a body that is complete has s3fs's own limit.
        (and what s3fs raises)
    """
    bucket, name, _ = files.split_path(key)
    content.seek(0)
    content.watch(content.size)
    request = files._call_s3("put_object", Bucket=bucket, Key=name, Body=content, **options)
    _wait(files, request, content, stall_timeout_s)


def _wait(files: s3fs.S3FileSystem, request: Coroutine[Any, Any, Any], content: Watched, limit_s: float) -> None:
    future = asyncio.run_coroutine_threadsafe(request, files.loop)
    while True:
        try:
            future.result(timeout=min(_LOOK_S, limit_s / 4))
            return
        except NotYetError:
            # One class since Python 3.11: also what the request itself raises.
            if future.done():
                raise
        sent = content.closed or content.tell() == content.size > 0
        if not sent and time.monotonic() - content.read_at > limit_s:
            future.cancel()
            raise RequestError("a connection that takes no data", reason=Reason.STALLED)
