"""A store on a local disk: a temporary file in the same folder, fsync, rename."""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from draf_dist.errors import DrafError, StorageFullError, UnreachableError, explain
from draf_dist.storage.base import Store, checked
from draf_dist.storage.traffic import Traffic

# Names of files that are still being written; never listed, never referred to.
UNFINISHED = ".draf-unfinished-"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
COPY_BLOCK_BYTES = 2**20


class LocalStore(Store):
    """A folder. It is made when something is first written into it. Its traffic leaves out what is read by `local_path`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)
        self.traffic = Traffic()

    def read(self, path: str) -> bytes:
        """See Store."""
        with self._translated(path):
            return self._counted(self._file(path).read_bytes())

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """See Store."""
        with self._translated(path), self._file(path).open("rb") as file:
            file.seek(start)
            return self._counted(file.read(stop - start))

    def read_with_etag(self, path: str) -> tuple[bytes, str]:
        """See Store; the tag is the sha256 of the content."""
        data = self.read(path)
        return data, hashlib.sha256(data).hexdigest()

    def write(self, path: str, data: bytes | memoryview) -> None:
        """See Store."""
        with self._translated(path), self._unfinished(path) as temporary:
            _write_synced(temporary, data)
            self._publish(temporary, path)

    def upload(self, path: str, local: Path) -> None:
        """See Store."""
        with self._translated(path), self._unfinished(path) as temporary:
            with local.open("rb") as source, temporary.open("xb") as target:
                shutil.copyfileobj(source, target, COPY_BLOCK_BYTES)
                target.flush()
                os.fsync(target.fileno())
            self._publish(temporary, path)

    def create(self, path: str, data: bytes) -> bool:
        """See Store."""
        with self._translated(path), self._unfinished(path) as temporary:
            _write_synced(temporary, data)
            with _locked(self._file(path).parent):
                if self._file(path).exists():
                    return False
                self._publish(temporary, path)
        return True

    def swap(self, path: str, data: bytes, etag: str) -> bool:
        """See Store."""
        with self._translated(path), self._unfinished(path) as temporary:
            _write_synced(temporary, data)
            with _locked(self._file(path).parent):
                if not self.exists(path) or self.read_with_etag(path)[1] != etag:
                    return False
                self._publish(temporary, path)
        return True

    def size(self, path: str) -> int | None:
        """See Store."""
        file = self._file(path)
        return file.stat().st_size if file.is_file() else None

    def list(self, prefix: str = "") -> list[str]:
        """See Store."""
        files = (file for file in self._file(prefix).rglob("*") if file.is_file() and not file.name.startswith(UNFINISHED))
        return sorted(file.relative_to(self.root).as_posix() for file in files)

    def delete(self, path: str) -> None:
        """See Store."""
        with self._translated(path):
            self._file(path).unlink(missing_ok=True)

    def local_path(self, path: str) -> Path | None:
        """See Store."""
        return self._file(path)

    def _file(self, path: str) -> Path:
        return self.root / checked(path)

    @contextmanager
    def _unfinished(self, path: str) -> Iterator[Path]:
        """A name beside the target for the file while it is written; nothing stays at that name, whatever happens."""
        folder = self._file(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{UNFINISHED}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _counted(self, data: bytes) -> bytes:
        self.traffic.add_request()
        self.traffic.add_read(len(data))
        return data

    def _publish(self, temporary: Path, path: str) -> None:
        target = self._file(path)
        self.traffic.add_request()
        self.traffic.add_written(temporary.stat().st_size)
        temporary.replace(target)
        # The rename itself must survive a power cut, or a later object could refer to a file that is gone.
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._explained(error, path) from error

    def _explained(self, error: OSError, path: str) -> DrafError:
        where = self.where(path)
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            return self.missing(path)
        if error.errno in NO_ROOM:
            return full(where, self.root)
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            remedy = "Ask for access, or use another folder."
            return UnreachableError(explain(where, expected="permission to read and write", found="none", remedy=remedy))
        if isinstance(error, NotADirectoryError | FileExistsError):
            return self.missing(path)
        return UnreachableError(
            explain(where, expected="a disk that answers", found=os.strerror(error.errno or errno.EIO), remedy="Check the disk.")
        )


@contextmanager
def room_on(folder: Path) -> Iterator[None]:
    """Turns a disk that is full inside the block into StorageFullError; folder is what is written to."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise full(str(folder), folder) from error
        raise


def full(where: str, folder: Path) -> StorageFullError:
    """The error for a disk without room; folder is any path on it."""
    while not folder.exists():
        folder = folder.parent
    found = f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free"
    return StorageFullError(
        explain(where, expected="room on the disk", found=found, remedy="Free space, then run the same command again.")
    )


def _write_synced(file: Path, data: bytes | memoryview) -> None:
    with file.open("xb") as target:
        target.write(data)
        target.flush()
        os.fsync(target.fileno())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder against other processes that swap or create in it; the lock goes with its holder, even a killed one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
