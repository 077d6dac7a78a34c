"""A file of fixed size, mapped into memory, that holds the newest records: what was put there outlives a killed process.

A record costs a copy into memory that the kernel owns; nothing is flushed, because the kernel writes it out whatever becomes of the
process. What a power cut takes with it are the last seconds. Layout: a head of HEAD_BYTES (magic, slots, their size, what it is
about as JSON), then the slots, each a number, a length, a crc32 and the record. A record that was cut short by a kill does not have
its crc32, and is left out.
"""

import json
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from draf_dist.errors import DataError, explain

MAGIC = b"draf-flight-1\n\0\0"
HEAD_BYTES = 4096
_HEAD = struct.Struct("<16sIII")
_SLOT = struct.Struct("<QII")


class Ring:
    """The writer's side of a ring of its own.

    The file's blocks are there from the start: on a disk that is full, writing to a mapped page that has none ends the process.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, num_slots: int, record_bytes: int) -> None:
        """record_bytes: what a record may have at most; longer ones are cut.

        Raises:
            OSError: no room, or there is such a file.
        """
        self.path = path
        self._num_slots, self._slot_bytes = num_slots, _SLOT.size + record_bytes
        size = HEAD_BYTES + num_slots * self._slot_bytes
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        text = json.dumps(about).encode()
        self._map[: _HEAD.size] = _HEAD.pack(MAGIC, num_slots, self._slot_bytes, len(text))
        self._map[_HEAD.size : _HEAD.size + len(text)] = text

    def __enter__(self) -> "Ring":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._map.close()

    def put(self, number: int, record: bytes) -> None:
        """Puts a record in the place of the one with this number, or of the oldest. Numbers rise; 0 is none."""
        data = record[: self._slot_bytes - _SLOT.size]
        at = HEAD_BYTES + number % self._num_slots * self._slot_bytes
        # The head last: before it is there the crc32 does not fit.
        self._map[at + _SLOT.size : at + _SLOT.size + len(data)] = data
        self._map[at : at + _SLOT.size] = _SLOT.pack(number, len(data), zlib.crc32(data))


@dataclass(frozen=True)
class RingContent:
    """What a ring holds: what it is about, and its records by number, oldest first."""

    about: dict[str, Any]
    records: dict[int, bytes]


def read_ring(path: Path) -> RingContent:
    """What is in the file of a ring, also while its writer goes on.

    Raises:
        DataError: it is no such file.
    """
    data = path.read_bytes()
    head = _HEAD.unpack_from(data) if len(data) >= HEAD_BYTES else (b"", 0, 0, 0)
    magic, num_slots, slot_bytes, length = head
    if magic != MAGIC or len(data) != HEAD_BYTES + num_slots * slot_bytes:
        remedy = "It belongs to no attempt that got as far as its first step."
        raise DataError(explain(str(path), expected="the ring of a flight recorder", found="something else", remedy=remedy))
    records = {}
    for slot in range(num_slots):
        at = HEAD_BYTES + slot * slot_bytes
        number, size, crc = _SLOT.unpack_from(data, at)
        record = data[at + _SLOT.size : at + _SLOT.size + size]
        if number and zlib.crc32(record) == crc:
            records[number] = record
    return RingContent(json.loads(data[_HEAD.size : _HEAD.size + length]), dict(sorted(records.items())))
