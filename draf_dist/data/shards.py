"""Shards: plain WebDataset tars with an index of byte ranges beside them.

Members of one sample are named `<uid, 16 hex>.<modality>.png|npy` and `<uid>.json`; samples lie in the order of their uids, which
are keyed hashes, so the sites are mixed. Any WebDataset reader can read the tar without the index.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.npy import decode_npy
from draf_dist.errors import DataError, explain
from draf_dist.schema.identity import uid_name
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, VolumeSpec

META = "json"
# Grey and RGB; an image of another number of channels is stored as npy.
PNG_CHANNELS = (1, 3)
READ_BLOCK_BYTES = 8 * 2**20
# Columns of the index table after the uid: (offset, size, crc32) for every modality in axis order, then for the json.
OFFSET, SIZE, CRC32 = range(3)
ABSENT = -1
# What the index of a foreign tar has behind them: site and label.
FOREIGN_COLUMNS = 2


@dataclass(frozen=True)
class Member:
    """Bytes [offset, offset + size) of a tar hold one file, without its tar header."""

    offset: int
    size: int
    crc32: int

    @property
    def stop(self) -> int:
        """One past the last byte."""
        return self.offset + self.size

    def matches(self, data: bytes | memoryview) -> bool:
        """Whether these are the bytes that were written."""
        return len(data) == self.size and zlib.crc32(data) == self.crc32


@dataclass(frozen=True)
class ShardIndex:
    """Where everything of one tar is. Stored as one .npy of int64 (n, 1 + 3 (M + 1)), for a foreign tar two columns wider.

    modalities: names of the M parts in the order of `DataSchema.stored`: the modalities; of a release with masks, then the mask.
    uids: int64 (n,); ascending in a tar of our own, in the order in which they lie in a foreign one.
    members: int64 (n, M + 1, 3) of (offset, size, crc32), -1 where a modality is absent; the last of the M + 1 is the json.
    sites, labels: int64 (n,), indices into those of the schema, or None. A foreign tar has no json of ours: all that a sample
    needs stands here, and the last of the M + 1 is absent throughout. In a tar of our own the json says it.
    """

    modalities: tuple[str, ...]
    uids: NDArray[np.int64]
    members: NDArray[np.int64]
    sites: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether the tar was written by somebody else, so that its samples have no json of ours."""
        return self.sites is not None

    @property
    def num_samples(self) -> int:
        """Samples in the tar."""
        return len(self.uids)

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which of the M parts each sample has: bool (n, M)."""
        return np.asarray(self.members[:, :-1, OFFSET] != ABSENT)

    def member(self, i: int, modality: str) -> Member | None:
        """The modality of sample i, None where it is absent."""
        return self._member(i, self.modalities.index(modality))

    def meta(self, i: int) -> Member:
        """The json of sample i, in a tar of our own."""
        found = self._member(i, len(self.modalities))
        assert found is not None  # every sample has one: decode_index refuses an index without
        return found

    @cached_property
    def extents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of every sample, the first byte of what it has and one past the last: int64 (n,) each."""
        offset, size = self.members[:, :, OFFSET], self.members[:, :, SIZE]
        has = offset != ABSENT
        start = np.where(has, offset, np.iinfo(np.int64).max).min(axis=1)
        return start, np.where(has, offset + size, 0).max(axis=1)

    def extent(self, i: int) -> tuple[int, int]:
        """Bytes [start, stop) that hold all members of sample i (and the tar headers between them)."""
        present = self.members[i][self.members[i, :, OFFSET] != ABSENT]
        return int(present[:, OFFSET].min()), int((present[:, OFFSET] + present[:, SIZE]).max())

    def _member(self, i: int, column: int) -> Member | None:
        offset, size, crc32 = (int(value) for value in self.members[i, column])
        return None if offset == ABSENT else Member(offset, size, crc32)


@dataclass(frozen=True)
class SampleMeta:
    """The json of a sample: no dates, no raw identifiers.

    subject is a pseudonym, site and label are names, quality maps modality -> [0, 1] where it is known.
    """

    uid: int
    subject: str
    site: str
    label: str
    quality: Mapping[str, float]


META_KEYS = frozenset(field.name for field in fields(SampleMeta))


def encode_meta(meta: SampleMeta) -> bytes:
    """The json member, the same bytes for the same sample."""
    content = asdict(meta) | {"uid": uid_name(meta.uid)}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def decode_meta(data: bytes) -> SampleMeta:
    """The json member read back.

    Raises:
        ValueError: it is not what `encode_meta` writes.
    """
    content = json.loads(str(data, "utf-8"))
    if not isinstance(content, dict) or content.keys() != META_KEYS:
        raise ValueError("not the json of a sample")
    if not isinstance(content["quality"], dict) or not all(isinstance(content[name], str) for name in ("subject", "site", "label")):
        raise ValueError("not the json of a sample")
    quality = {str(name): float(value) for name, value in content["quality"].items()}
    return SampleMeta(int(content["uid"], 16), content["subject"], content["site"], content["label"], quality)


def member_name(uid: int, spec: ModalitySpec) -> str:
    """The name of a modality's file in the tar."""
    return f"{uid_name(uid)}.{extension(spec)}"


def extension(spec: ModalitySpec) -> str:
    """What follows the uid in a member's name."""
    if isinstance(spec, VolumeSpec):
        return f"{spec.name}.json"
    is_png = isinstance(spec, ImageSpec) and spec.channels in PNG_CHANNELS
    return f"{spec.name}.{'png' if is_png else 'npy'}"


def encode_index(index: ShardIndex) -> bytes:
    """The .idx file, the same bytes for the same index."""
    columns = [index.uids[:, None], index.members.reshape(index.num_samples, 3 * (len(index.modalities) + 1))]
    if index.sites is not None and index.labels is not None:
        columns += [index.sites[:, None], index.labels[:, None]]
    table = np.concatenate(columns, axis=1)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, table.astype("<i8"), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def decode_index(data: bytes, modalities: tuple[str, ...]) -> ShardIndex:
    """The .idx file read back.

    Raises:
        ValueError: it is not the index of a shard with these modalities.
    """
    table = decode_npy(data, np.dtype("<i8"))
    num_columns = 1 + 3 * (len(modalities) + 1)
    if table.ndim != 2 or table.shape[1] not in (num_columns, num_columns + FOREIGN_COLUMNS):
        raise ValueError(f"expected int64 (n, {num_columns}), found {table.shape}")
    members = np.ascontiguousarray(table[:, 1:num_columns]).reshape(len(table), len(modalities) + 1, 3)
    uids = np.ascontiguousarray(table[:, 0])
    if table.shape[1] == num_columns:
        if (members[:, -1, OFFSET] < 0).any():
            raise ValueError("a sample without its json")
        return ShardIndex(modalities, uids, members)
    sites, labels = (np.ascontiguousarray(column) for column in table[:, num_columns:].T)
    if (members[:, -1] != ABSENT).any() or (np.stack([uids, sites, labels]) < 0).any():
        raise ValueError("a sample without its site or label")
    return ShardIndex(modalities, uids, members, sites, labels)


class ShardWriter:
    """Writes one tar: the same samples give the same bytes. A context manager: the tar is complete once the block has ended."""

    def __init__(self, path: Path) -> None:
        # It imports torch; processes that only read shards start in a third of the time without.
        from webdataset.writer import TarWriter

        self._file = path.open("wb")
        self._tar = TarWriter(self._file, user="", group="", mode=0o444, mtime=0, encoder=False)

    def write(self, uid: int, members: Mapping[str, bytes]) -> None:
        """Appends a sample; members maps what follows the uid in a file's name (see `extension`, and META) to its bytes."""
        self._tar.write({"__key__": uid_name(uid), **members})

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._tar.close()
            self._file.close()
            return
        # The tar is not to be used: what ended it is told, not that it could not be ended properly (on a full disk).
        with suppress(OSError):
            self._tar.close()
        with suppress(OSError):
            self._file.close()


def index_tar(path: Path, schema: DataSchema) -> ShardIndex:
    """The index of a tar, found by reading all of it.

    Raises:
        DataError: it is no tar, or holds a member that does not belong there; the first such member is named.
    """
    columns = {extension(spec): column for column, spec in enumerate(schema.stored)} | {META: len(schema.stored)}
    rows: dict[int, NDArray[np.int64]] = {}
    for name, member in _walk(path):
        stem, _, suffix = name.partition(".")
        if suffix not in columns or len(stem) != 16:
            expected = "a file named after a sample and modality"
            raise DataError(explain(f"{path.name}: {name}", expected=expected, found="another", remedy="Restore the shard."))
        row = rows.setdefault(int(stem, 16), np.full((len(columns), 3), ABSENT, dtype=np.int64))
        row[columns[suffix]] = member.offset, member.size, member.crc32
    members = np.stack(list(rows.values())) if rows else np.empty((0, len(columns), 3), dtype=np.int64)
    return ShardIndex(schema.stored_names, np.fromiter(rows, dtype=np.int64, count=len(rows)), members)


def _walk(path: Path) -> Iterator[tuple[str, Member]]:
    """Name and place of every member, in the order they lie."""
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            source = tar.extractfile(info)
            if source is None:
                raise DataError(explain(f"{path.name}: {info.name}", expected="a file", found="none", remedy="Restore the shard."))
            yield info.name, Member(info.offset_data, info.size, zlib.crc32(source.read()))


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cut(sizes: Sequence[int], limit: int) -> list[slice]:
    """Consecutive runs of at least one item whose sizes sum to at most `limit` (a larger item is a run of its own)."""
    runs: list[slice] = []
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            runs.append(slice(start, i))
            start, total = i, 0
        total += size
    return [*runs, slice(start, len(sizes))] if len(sizes) > start else runs
