"""A tar that somebody else wrote, read once from front to end, in blocks, whatever store it lies in.

ustar, GNU and PAX headers, also long names. Nothing is unpacked, no link is followed, and no header makes us hold more than its
limit: a tar whose structure is not sound is refused as a whole, for what lies behind the first broken header is anybody's guess.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from draf_dist.data.shards import READ_BLOCK_BYTES
from draf_dist.storage import Store

BLOCK_BYTES = 512
# A long name or a set of PAX records; both are a few hundred bytes in any tar that means well.
MAX_HEADER_BYTES = 2**20
# Types of entries. Those without content have none, whatever their size field says: links, devices, folders, pipes.
_FILES = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
_FOLDER, _GNU_SPARSE = b"5", b"S"
# Types of headers that say more of the entry behind them (or, the global one, of all behind it).
_GLOBAL, _LOCAL, _LONG_NAME, _LONG_LINK = b"g", b"x", b"L", b"K"
# The PAX records that we heed. Of a sparse file in PAX form the first of these stands for the path.
_SPARSE_NAME, _PATH, _SIZE, _SPARSE = "GNU.sparse.name", "path", "size", "GNU.sparse."
_ZEROS = bytes(BLOCK_BYTES)


class BrokenTarError(Exception):
    """The structure of a tar is not sound; the text says what and at which byte."""


@dataclass(frozen=True)
class Entry:
    """One file of a tar. number counts from 1; [offset, offset + size) is its content. is_file: neither link, device nor sparse."""

    number: int
    name: str
    offset: int
    size: int
    is_file: bool


class TarStream:
    """Reads an object once and in order, a block ahead; sha256 is that of what was read. A context manager."""

    def __init__(self, store: Store, path: str, size_bytes: int) -> None:
        self.position, self.size_bytes = 0, size_bytes
        self._store, self._path = store, path
        self._digest = hashlib.sha256()
        self._buffer, self._start = b"", 0
        self._pool = ThreadPoolExecutor(1)
        self._ahead: Future[bytes] = self._pool.submit(self._fetch, 0)

    def read(self, size: int) -> bytes:
        """The next `size` bytes.

        Raises:
            BrokenTarError: there are fewer.
        """
        parts = []
        while size:
            part = self._next(size)
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int) -> None:
        """Goes on without the next `size` bytes; raises as `read`."""
        while size:
            size -= len(self._next(size))

    def sha256(self) -> str:
        """Of the whole object, once it has been read to its end."""
        return self._digest.hexdigest()

    def __enter__(self) -> "TarStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _next(self, most: int) -> bytes:
        """At least one byte of what follows, at most `most`."""
        if self.position == self._start + len(self._buffer):
            self._advance()
        at = self.position - self._start
        part = self._buffer[at : at + most]
        self.position += len(part)
        return part

    def _advance(self) -> None:
        if self.position >= self.size_bytes:
            raise BrokenTarError(f"its end after {self.size_bytes} bytes, in the middle of a file")
        self._start, self._buffer = self.position, self._ahead.result()
        if not self._buffer:
            raise BrokenTarError(f"no more than {self.position} of its {self.size_bytes} bytes: it changes while it is read")
        self._ahead = self._pool.submit(self._fetch, self._start + len(self._buffer))

    def _fetch(self, start: int) -> bytes:
        stop = min(start + READ_BLOCK_BYTES, self.size_bytes)
        data = bytes(self._store.read_range(self._path, start, stop)) if stop > start else b""
        # Fetched in order, one at a time.
        self._digest.update(data)
        return data


def walk(stream: TarStream) -> Iterator[Entry]:
    """Every entry but folders, in order; the caller may read the content of the latest from the stream. Reads to the very end.

    Raises:
        BrokenTarError: a header that is none, content that is cut short, or anything behind the end.
    """
    number = 0
    shared: dict[str, str] = {}
    local: dict[str, str] = {}
    while (header := _header(stream)) != _ZEROS:
        at, kind = stream.position - BLOCK_BYTES, header[156:157]
        size = _number(header[124:136], at)
        if kind in (_GLOBAL, _LOCAL, _LONG_NAME, _LONG_LINK):
            content = _content(stream, size, at)
            if kind == _GLOBAL:
                shared |= _records(content, at)
            elif kind == _LOCAL:
                local |= _records(content, at)
            elif kind == _LONG_NAME:
                local[_PATH] = _text(content)
            continue
        number += 1
        entry = _entry(stream, header, {**shared, **local}, number=number)
        local = {}
        if kind != _FOLDER and not entry.name.endswith("/"):
            yield entry
        stream.skip(entry.offset + _padded(entry.size) - stream.position)
    _check_end(stream)


def _header(stream: TarStream) -> bytes:
    at = stream.position
    if stream.size_bytes - at < BLOCK_BYTES:
        raise BrokenTarError(f"its end at byte {stream.size_bytes} without the mark of an end: it is cut short")
    header = stream.read(BLOCK_BYTES)
    if header == _ZEROS:
        return header
    if at == 0 and header[:2] == b"\x1f\x8b":
        raise BrokenTarError("a compressed file: unpack it (gunzip), for bytes in the middle of it can't be read")
    # The sum of a header counts its own eight bytes as blanks.
    if _number(header[148:156], at) != sum(header) - sum(header[148:156]) + 8 * 32:
        raise BrokenTarError(f"no tar header at byte {at}")
    return header


def _entry(stream: TarStream, header: bytes, said: dict[str, str], *, number: int) -> Entry:
    kind, at = header[156:157], stream.position - BLOCK_BYTES
    if kind == _GNU_SPARSE:
        _skip_sparse_map(stream, header)
    size = _number(header[124:136], at) if _SIZE not in said else _decimal(said[_SIZE], at)
    is_sparse = any(name.startswith(_SPARSE) for name in said)
    name = said.get(_SPARSE_NAME, said.get(_PATH, _own_name(header)))
    size = 0 if kind in _WITHOUT_CONTENT else size
    return Entry(number, name, stream.position, size, is_file=kind in _FILES and not is_sparse)


def _own_name(header: bytes) -> str:
    name = _text(header[:100])
    # GNU's magic is another, and it keeps other things there.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _skip_sparse_map(stream: TarStream, header: bytes) -> None:
    more = header[482]
    while more:
        more = stream.read(BLOCK_BYTES)[504]


def _content(stream: TarStream, size: int, at: int) -> bytes:
    """Of a header that says more."""
    if size > MAX_HEADER_BYTES:
        raise BrokenTarError(f"a header of {size} bytes at byte {at}, where {MAX_HEADER_BYTES} is plenty")
    return stream.read(_padded(size))[:size]


def _records(content: bytes, at: int) -> dict[str, str]:
    """PAX records, one after the other: "<length of all of it> <name>=<value>" and the end of a line."""
    records: dict[str, str] = {}
    start = 0
    while start < len(content):
        blank = content.find(b" ", start, start + 20)
        stop = start + _decimal(content[start:blank].decode("latin-1"), at) if blank > 0 else 0
        name, equals, value = content[blank + 1 : stop - 1].partition(b"=")
        if stop > len(content) or content[stop - 1 : stop] != b"\n" or not equals:
            raise BrokenTarError(f"a PAX header that can't be read at byte {at}")
        records[_text(name)] = _text(value)
        start = stop
    return records


def _check_end(stream: TarStream) -> None:
    """Behind the first block of zeros there may be more zeros and nothing else: a second tar there would be lost unsaid."""
    while left := stream.size_bytes - stream.position:
        at, block = stream.position, stream.read(min(left, READ_BLOCK_BYTES))
        if block.count(0) != len(block):
            raise BrokenTarError(f"more behind its end, after byte {at}: were several tars joined?")


def _number(digits: bytes, at: int) -> int:
    """A number field: octal, or base 256 where the first bit is set."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    text = digits.split(b"\0", 1)[0].strip(b" ")
    if text.strip(b"01234567"):
        raise BrokenTarError(f"no tar header at byte {at}")
    return int(text or b"0", 8)


def _decimal(text: str, at: int) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 20:
        raise BrokenTarError(f"a PAX header that can't be read at byte {at}")
    return int(text)


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _text(data: bytes) -> str:
    """What is no UTF-8 stays visible as such: the name is then refused."""
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
