"""What a protocol asks of a store, and the driver that does it.

A protocol is a generator: it yields operations and is sent their results; it has no store, no clock and no threads. So the same
lines run on a disk, on S3, and under a scheduler that interleaves and crashes them (docs/protocols.md).

Any operation may take effect and its answer be lost, and then be made again. A protocol believes no refusal of Create or Swap
before it has looked: what it finds there may be its own.
"""

import hashlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from draf_dist.schema.record import Record
from draf_dist.storage import MissingError, Store

# What is read at once of a file whose digest is taken.
BLOCK_BYTES = 8 * 2**20


class FileRecord(Record):
    """One file: its size, and the sha256 of its content in hex."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Read:
    """The content, bytes; None where there is nothing."""

    path: str


@dataclass(frozen=True, slots=True)
class ReadWithEtag:
    """The content and the tag to swap it by, (bytes, str); None where there is nothing."""

    path: str


@dataclass(frozen=True, slots=True)
class Inspect:
    """The FileRecord of what lies there; None where there is nothing."""

    path: str


@dataclass(frozen=True, slots=True)
class Size:
    """Size in bytes; None where there is nothing."""

    path: str


@dataclass(frozen=True, slots=True)
class List:
    """Paths of all objects below the folder, sorted."""

    prefix: str


@dataclass(frozen=True, slots=True)
class Create:
    """Whether the object was written: not if there was one."""

    path: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Swap:
    """Whether the object was replaced: not if its content no longer had the tag."""

    path: str
    data: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Write:
    """Writes or replaces the object; data: its content, or the local file that holds it."""

    path: str
    data: bytes | memoryview | Path


@dataclass(frozen=True, slots=True)
class Delete:
    """Removes the object, if there is one."""

    path: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Lets others go on before the next look."""

    seconds: float


Operation = Read | ReadWithEtag | Inspect | Size | List | Create | Swap | Write | Delete | Wait
Result = TypeVar("Result")
# Any: every operation has a result of its own type.
Steps = Generator[Operation, Any, Result]


def drive(steps: Steps[Result], perform: Callable[[Operation], Any]) -> Result:
    """What the protocol returns, `perform` being asked for one operation after the other; raises what either raises."""
    answer = None
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration as ended:
            result: Result = ended.value
            return result
        answer = perform(operation)


def run_on(
    store: Store,
    steps: Steps[Result],
    *,
    wait: Callable[[float], object] = time.sleep,
    inspect: Callable[[Store, str], FileRecord | None] | None = None,
) -> Result:
    """What the protocol returns, carried out on a store.

    wait: called with the seconds of every Wait; it may raise to give the protocol up. inspect: instead of reading a file for its
    digest alone, so that a caller who needs the file reads it once.

    Raises:
        DrafError: whatever the store or the protocol raises.
    """

    def perform(operation: Operation) -> Any:
        match operation:
            case Wait(seconds):
                return wait(seconds)
            case Inspect(path) if inspect is not None:
                return inspect(store, path)
        return performed(store, operation)

    return drive(steps, perform)


def performed(store: Store, operation: Operation) -> Any:
    """The result of one operation on a store."""
    try:
        return _asked(store, operation)
    except MissingError:
        return None


def record_of(store: Store, path: str) -> FileRecord | None:
    """Size and sha256 of an object, read block by block; None where there is nothing."""
    size = store.size(path)
    if size is None:
        return None
    digest = hashlib.sha256()
    for start in range(0, size, BLOCK_BYTES):
        digest.update(store.read_range(path, start, min(start + BLOCK_BYTES, size)))
    return FileRecord(size_bytes=size, sha256=digest.hexdigest())


def _asked(store: Store, operation: Operation) -> Any:
    match operation:
        case Read(path):
            return store.read(path)
        case ReadWithEtag(path):
            return store.read_with_etag(path)
        case Inspect(path):
            return record_of(store, path)
        case Size(path):
            return store.size(path)
        case List(prefix):
            return store.list(prefix)
    return _changed(store, operation)


def _changed(store: Store, operation: Operation) -> Any:
    match operation:
        case Create(path, data):
            return store.create(path, data)
        case Swap(path, data, etag):
            return store.swap(path, data, etag)
        case Write(path, Path() as local):
            return store.upload(path, local)
        case Write(path, bytes() | memoryview() as data):
            return store.write(path, data)
        case Delete(path):
            return store.delete(path)
    raise AssertionError(f"nothing that a store does: {operation}")
