"""The folder of a node cache: whose it may be, what lies where in it, and who is alive in it."""

import errno
import json
import os
import re
import secrets
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from draf_dist.data.node_cache_holds import Hold, is_held, wait_for
from draf_dist.errors import DrafError, SpecError, UnreachableError, explain
from draf_dist.storage.local import NO_ROOM, full

if TYPE_CHECKING:
    from typing_extensions import Buffer

BlockKey = tuple[str, int]
BLOCKS, LEASES, UNFINISHED, INDEX = "blocks", "leases", "unfinished", "index.sqlite"
# The step of a process that has not said yet how far it is: it may need everything.
NOT_BEGUN = -(2**62)
# How long a lock of another process is waited for. A fetch that runs ends within the time for which a store is asked again
# (storage.retry.RETRY_FOR_S, 120 s), mostly within a second, and a transaction within milliseconds: whoever takes half that time
# is stopped, or meets a store that does not answer, and waiting longer helps in neither case.
PATIENCE_S = 60.0
_CONTENT_ID = re.compile(r"[0-9a-f]{64}")
_BLOCK_NAME = re.compile(r"([0-9a-f]{64})-([0-9]+)")
_STEP = struct.Struct("<q")
_OTHER_FOLDER = "Set DRAF_CACHE_DIR to a folder that does not exist yet; it is made."


class Block:
    """A block of bytes, readable as long as this handle is, whatever is evicted meanwhile."""

    __slots__ = ("_descriptor", "inode", "size")

    def __init__(self, descriptor: int) -> None:
        """Takes over the descriptor of a file."""
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        self.size, self.inode = status.st_size, status.st_ino

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), shorter where the block ends before stop; safe from several threads."""
        return os.pread(self._descriptor, stop - start, start)


class HeldError(UnreachableError):
    """Another process has the folder locked and does not go on."""


@dataclass(frozen=True)
class LiveLease:
    """What a live process says of itself: the bytes that its job needs at once, and the step it has reached.

    part: which of the job's passes it is at (training, validation): each counts steps of its own.
    """

    job: str
    needed_bytes: int
    part: str = ""
    step: int = NOT_BEGUN

    @property
    def name(self) -> str:
        """What blocks are needed by: the pass of the job."""
        return f"{self.job} {self.part}" if self.part else self.job


class CacheFolder:
    """Files and holds; which block is needed by whom is the index's business."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - resolve() would follow the link that is refused
        self.index = self.root / INDEX
        self._blocks = str(self.root / BLOCKS)
        self._patience_s = PATIENCE_S
        self.prepare()

    def prepare(self) -> None:
        """Makes what is missing of the folder.

        Raises:
            SpecError: it is a link, no folder, another user's or one that others can write to.
        """
        if not os.path.lexists(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if problem := _problem(self.root.lstat()):
            raise SpecError(explain(str(self.root), expected="a folder of this user alone", found=problem, remedy=_OTHER_FOLDER))
        for part in (BLOCKS, LEASES, UNFINISHED):
            (self.root / part).mkdir(mode=0o700, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder against all other threads and processes.

        Raises:
            HeldError: another process has it for PATIENCE_S. Then, until it goes on, the next ones raise it at once.
        """
        try:
            hold = self._lock()
        except FileNotFoundError:
            self.prepare()  # somebody removed it while we run
            hold = self._lock()
        try:
            yield
        finally:
            hold.release()

    def _lock(self) -> Hold:
        try:
            hold = Hold(self.root, self._patience_s)
        except TimeoutError as error:
            self._patience_s = 0.0
            found = f"a process that has held it for {PATIENCE_S:.0f} s, perhaps a stopped one"
            remedy = f"`fuser {self.root}` names it: let it go on, or end it."
            raise HeldError(explain(str(self.root), expected="the lock of the cache", found=found, remedy=remedy)) from error
        self._patience_s = PATIENCE_S
        return hold

    # Blocks

    def block_path(self, key: BlockKey) -> str:
        """Where a block lies; only content ids make a path. A str: a Path would cost as much as all else of a hit."""
        content, number = key
        if not _CONTENT_ID.fullmatch(content) or number < 0:
            raise ValueError("a block is named by 64 hex digits and its number")
        return f"{self._blocks}/{content[:2]}/{content}-{number}"

    def open_block(self, key: BlockKey) -> Block | None:
        """The block; None if it is not there."""
        try:
            return Block(os.open(self.block_path(key), os.O_RDONLY))
        except FileNotFoundError:
            return None

    def remove_block(self, key: BlockKey) -> None:
        """Whoever has it open goes on reading."""
        Path(self.block_path(key)).unlink(missing_ok=True)

    def blocks(self) -> dict[BlockKey, int]:
        """What lies there, with sizes; files that are not ours by their names are left alone."""
        found: dict[BlockKey, int] = {}
        for folder in os.scandir(self.root / BLOCKS):
            for entry in os.scandir(folder.path) if folder.is_dir(follow_symlinks=False) else ():
                name = _BLOCK_NAME.fullmatch(entry.name)
                if name and entry.is_file(follow_symlinks=False):
                    found[name[1], int(name[2])] = entry.stat().st_size
        return found

    # Fetches

    def begin_fetch(self) -> Hold:
        """A new folder for files that are being written, held; its name stands for the fetch. The cache folder must be locked."""
        path = self.root / UNFINISHED / secrets.token_hex(8)
        path.mkdir(mode=0o700)
        return Hold(path, PATIENCE_S)

    def end_fetch(self, hold: Hold) -> None:
        """Removes what was not published and tells those who wait."""
        try:
            hold.path.rmdir()
        except OSError:  # something is left in it
            shutil.rmtree(hold.path, ignore_errors=True)
        hold.release()

    def write_block(self, fetch: Hold, key: BlockKey, data: "Buffer") -> Block:
        """Writes a block beside its place and moves it there."""
        target = Path(self.block_path(key))
        unfinished = fetch.path / target.name
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _write(descriptor, data)
            target.parent.mkdir(mode=0o700, exist_ok=True)
            unfinished.rename(target)
        except BaseException:
            os.close(descriptor)
            # What is half-written would take the room that the next attempt needs.
            unfinished.unlink(missing_ok=True)
            raise
        return Block(descriptor)

    def fetches(self) -> list[str]:
        """The names of fetches that have not ended, dead ones too."""
        return [entry.name for entry in os.scandir(self.root / UNFINISHED)]

    def unfinished(self, fetch: str) -> Path:
        """The folder of a fetch."""
        return self.root / UNFINISHED / fetch

    def is_fetching(self, fetch: str) -> bool:
        """Whether the process of a fetch lives and is still at it."""
        return is_held(self.unfinished(fetch))

    def wait_for_fetch(self, fetch: str) -> bool:
        """Whether a fetch has ended within PATIENCE_S, well or not, or its process has."""
        return wait_for(self.unfinished(fetch), PATIENCE_S)

    def write_past(self, data: "Buffer") -> Block:
        """A block that only its holder knows of, and that takes room on the disk as long as it is held."""
        with tempfile.TemporaryFile(dir=self.root / UNFINISHED, buffering=0) as file:
            descriptor = os.dup(file.fileno())
        try:
            _write(descriptor, data)
        except BaseException:
            os.close(descriptor)
            raise
        return Block(descriptor)

    def clear_fetch(self, fetch: str) -> None:
        """Removes what a dead fetch has left unfinished."""
        shutil.rmtree(self.unfinished(fetch), ignore_errors=True)

    # Leases

    def new_lease(self, lease: LiveLease) -> Hold:
        """A file that says what this process's job needs, held as long as the process lives. The cache folder must be locked."""
        path = self.root / LEASES / secrets.token_hex(8)
        facts = {"job": lease.job, "needed_bytes": lease.needed_bytes, "part": lease.part}
        try:
            path.write_bytes(_STEP.pack(lease.step) + json.dumps(facts).encode())
            return Hold(path, PATIENCE_S, writable=True)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def end_lease(self, hold: Hold) -> None:
        """Takes the lease back."""
        hold.path.unlink(missing_ok=True)
        hold.release()

    def live_leases(self) -> list[LiveLease]:
        """Those whose process lives; the files of others are removed. The cache folder must be locked."""
        found = []
        for entry in os.scandir(self.root / LEASES):
            path = Path(entry.path)
            if not is_held(path):
                path.unlink(missing_ok=True)
                continue
            with suppress(FileNotFoundError):  # closed meanwhile
                found.append(_read_lease(path.read_bytes()))
        return found


def say_step(lease: Hold, step: int) -> None:
    """Writes down how far a process is; costs no lock."""
    os.pwrite(lease.descriptor, _STEP.pack(step), 0)


def _write(descriptor: int, data: "Buffer") -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns what a disk can answer into errors that name the folder."""
    try:
        yield
    except OSError as error:
        raise _told(error, folder) from error


def _read_lease(said: bytes) -> LiveLease:
    (step,) = _STEP.unpack_from(said)
    return LiveLease(step=step, **json.loads(said[_STEP.size :]))


def _problem(status: os.stat_result) -> str | None:
    if stat.S_ISLNK(status.st_mode):
        return "a link"
    if not stat.S_ISDIR(status.st_mode):
        return "no folder"
    if status.st_uid != os.geteuid():
        return f"one of the user {status.st_uid}"
    if status.st_mode & 0o022:
        return f"one that others can write to (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _told(error: OSError, folder: Path) -> DrafError:
    where, remedy = str(folder), "Check the disk, or set DRAF_CACHE_DIR to a folder on another."
    if error.errno in NO_ROOM:
        return full(where, folder)
    if isinstance(error, FileExistsError | NotADirectoryError):
        return SpecError(explain(where, expected="a folder", found="a file on the way", remedy=_OTHER_FOLDER))
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return UnreachableError(explain(where, expected="permission to read and write", found="none", remedy=_OTHER_FOLDER))
    found = error.strerror or type(error).__name__
    return UnreachableError(explain(where, expected="a disk that answers", found=found, remedy=remedy))
