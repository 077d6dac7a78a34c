"""Members of a split's shards: memory-mapped where the shards are local, in cached blocks where they are remote.

Bytes are handed out as they lie; `Place.check` compares them with the crc32 of the index, whose own sha256 is in the manifest.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.cache import SharedCache
from draf_dist.data.decode import MAX_META_BYTES, Bytes, max_member_bytes
from draf_dist.data.release import Release, tar_path
from draf_dist.data.shards import META, OFFSET, SIZE, Member, ShardIndex, extension
from draf_dist.errors import DataError, explain
from draf_dist.schema.identity import uid_name
from draf_dist.schema.release import ShardRecord, Split
from draf_dist.storage import MissingError

BLOCK_BYTES = 2**20
CACHE_BYTES = 256 * 2**20
# Neighbouring blocks are asked for together, up to this many in one request.
BLOCKS_PER_REQUEST = 8
OPEN_SHARDS = 256
_REMEDY = "Run draf release verify; restore the file or prepare again."

BlockKey = tuple[str, int]
BlockCache = SharedCache[BlockKey, bytes]


@dataclass(frozen=True)
class Place:
    """One file of one sample: shard_number counts within the split, suffix is what follows the uid in the file's name."""

    release: str
    shard: ShardRecord
    shard_number: int
    uid: int
    suffix: str
    member: Member

    def error(self, expected: str, found: str) -> DataError:
        """The error for this file; names release, shard and member."""
        where = f"{self.release}: shard {self.shard.sha256}: {uid_name(self.uid)}.{self.suffix}"
        return DataError(explain(where, expected=expected, found=found, remedy=_REMEDY))

    def check(self, data: Bytes) -> None:
        """Raises DataError unless these are the bytes that were written."""
        if not self.member.matches(data):
            raise self.error(f"{self.member.size} bytes with crc32 {self.member.crc32:08x}", "other bytes")


class ShardReader:
    """Reads the samples of one split, numbered 0..N-1 through its shards laid end to end in manifest order."""

    def __init__(self, release: Release, split: Split, blocks: BlockCache | None = None) -> None:
        self.release = release
        self._name = release.pinned_url
        self.shards = release.shards(split)
        self._first = np.concatenate([[0], np.cumsum([shard.num_samples for shard in self.shards], dtype=np.int64)])
        self._indexes: SharedCache[int, ShardIndex] = SharedCache(OPEN_SHARDS, lambda _: 1)
        self._maps: SharedCache[int, memoryview] = SharedCache(OPEN_SHARDS, lambda _: 1)
        self._blocks = blocks or make_block_cache()
        self._suffixes = [extension(spec) for spec in release.schema.modalities] + [META]

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self._first[-1])

    @property
    def is_local(self) -> bool:
        """Whether reading is a matter of memory, without requests."""
        return all(self.release.store.local_path(tar_path(shard)) is not None for shard in self.shards)

    def uids(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The uids of samples."""
        located = (self._locate(int(sample)) for sample in samples)
        return np.array([self._index(shard).uids[i] for shard, i in located], dtype=np.int64)

    def present(self, samples: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which modalities the samples have: bool (n, M)."""
        located = (self._locate(int(sample)) for sample in samples)
        rows = [self._index(shard).present[i] for shard, i in located]
        return np.array(rows, dtype=np.bool_).reshape(len(rows), len(self.release.schema.modalities))

    def places(self, sample: int) -> list[Place | None]:
        """Where the files of a sample lie: the modalities in axis order, None where absent, then the json."""
        shard, i = self._locate(sample)
        index, record = self._index(shard), self.shards[shard]
        uid = int(index.uids[i])
        members = [*(index.member(i, name) for name in index.modalities), index.meta(i)]
        return [
            None if member is None else Place(self._name, record, shard, uid, suffix, member)
            for member, suffix in zip(members, self._suffixes, strict=True)
        ]

    def read(self, places: Sequence[Place]) -> list[Bytes]:
        """The bytes of places, in their order, unchecked.

        Raises:
            DataError: a shard that is gone or has not the size that the manifest says.
            UnreachableError: the store does not answer.
        """
        result: list[Bytes] = [b""] * len(places)
        by_shard: dict[int, list[int]] = {}
        for number, place in enumerate(places):
            by_shard.setdefault(place.shard_number, []).append(number)
        for shard, numbers in by_shard.items():
            members = [places[number].member for number in numbers]
            path = self.release.store.local_path(tar_path(self.shards[shard]))
            parts = self._read_remote(self.shards[shard], members) if path is None else self._read_local(shard, path, members)
            for number, part in zip(numbers, parts, strict=True):
                result[number] = part
        return result

    def _read_local(self, number: int, path: Path, members: Sequence[Member]) -> list[Bytes]:
        (view,) = self._maps.get([number], lambda _: [self._map(self.shards[number], path)])
        return [view[member.offset : member.stop] for member in members]

    def _map(self, shard: ShardRecord, path: Path) -> memoryview:
        try:
            with path.open("rb") as file:
                # A file that is too short must be found now: reading a map behind its end kills the process.
                self._check_size(shard, path.stat().st_size)
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise self._broken(shard, "a shard", error.strerror or type(error).__name__) from error

    def _read_remote(self, shard: ShardRecord, members: Sequence[Member]) -> list[Bytes]:
        spans = [range(member.offset // BLOCK_BYTES, -(-member.stop // BLOCK_BYTES)) for member in members]
        wanted = sorted({block for span in spans for block in span})
        blocks = self._blocks.get(
            [(shard.sha256, block) for block in wanted], lambda keys: self._fetch(shard, [block for _, block in keys])
        )
        found = dict(zip(wanted, blocks, strict=True))
        return [
            self._cut(member, [found[block] for block in span], span.start) for member, span in zip(members, spans, strict=True)
        ]

    @staticmethod
    def _cut(member: Member, blocks: Sequence[bytes], first: int) -> bytes:
        start = member.offset - first * BLOCK_BYTES
        joined = blocks[0] if len(blocks) == 1 else b"".join(blocks)
        return joined[start : start + member.size]

    def _fetch(self, shard: ShardRecord, blocks: Sequence[int]) -> list[bytes]:
        """Ascending blocks of a shard, neighbours in one request."""
        runs = _runs(blocks)
        ranges = [(run.start * BLOCK_BYTES, min(run.stop * BLOCK_BYTES, shard.size_bytes)) for run in runs]
        try:
            answers = self.release.store.read_ranges(tar_path(shard), ranges)
        except MissingError as error:
            raise self._broken(shard, "a shard", "nothing") from error
        for (start, stop), answer in zip(ranges, answers, strict=True):
            if len(answer) != stop - start:
                raise self._broken(shard, f"{shard.size_bytes} bytes", f"an end after {start + len(answer)}")
        return [answer[at : at + BLOCK_BYTES] for answer in answers for at in range(0, len(answer), BLOCK_BYTES)]

    def _locate(self, sample: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        return shard, sample - int(self._first[shard])

    def _index(self, number: int) -> ShardIndex:
        (index,) = self._indexes.get([number], lambda _: [self._load_index(self.shards[number])])
        return index

    def _load_index(self, shard: ShardRecord) -> ShardIndex:
        index = self.release.index(shard)
        limits = np.array([*(max_member_bytes(spec) for spec in self.release.schema.modalities), MAX_META_BYTES])
        sizes, stops = index.members[:, :, SIZE], index.members[:, :, OFFSET] + index.members[:, :, SIZE]
        if index.num_samples != shard.num_samples or (stops > shard.size_bytes).any():
            raise self._broken(shard, "an index of this shard", "the index of another")
        if (sizes > limits).any():
            raise self._broken(shard, "members no larger than the schema allows", f"one of {int(sizes.max())} bytes")
        return index

    def _check_size(self, shard: ShardRecord, size_bytes: int) -> None:
        if size_bytes != shard.size_bytes:
            raise self._broken(shard, f"{shard.size_bytes} bytes", f"{size_bytes} bytes")

    def _broken(self, shard: ShardRecord, expected: str, found: str) -> DataError:
        where = f"{self.release.pinned_url}: shard {shard.sha256}"
        return DataError(explain(where, expected=expected, found=found, remedy=_REMEDY))


def make_block_cache(limit_bytes: int = CACHE_BYTES) -> BlockCache:
    """A cache of blocks that the readers of a process can share."""
    return SharedCache(limit_bytes, len)


def _runs(blocks: Sequence[int]) -> list[range]:
    """Ascending numbers as runs of neighbours, none longer than one request may be."""
    runs: list[range] = []
    for block in blocks:
        last = runs[-1] if runs else range(-1, -1)
        if last.stop == block and len(last) < BLOCKS_PER_REQUEST:
            runs[-1] = range(last.start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs
