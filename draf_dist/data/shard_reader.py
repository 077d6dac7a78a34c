"""The samples of a split: in which shard each lies, and at which bytes of it.

Bytes are read by `local_shards` and `remote_shards` as they lie; whoever decodes them compares them with the crc32 of the index,
whose own sha256 is in the manifest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.cache import SharedCache
from draf_dist.data.decode import MAX_META_BYTES, max_member_bytes
from draf_dist.data.release import CHANGED, Release
from draf_dist.data.shards import META, OFFSET, SIZE, ShardIndex, extension
from draf_dist.errors import DataError, explain
from draf_dist.schema.identity import uid_name
from draf_dist.schema.release import ShardRecord, Split

# Indexes that are kept: those of a few hundred open shards of the usual size many times over.
INDEX_BYTES = 256 * 2**20
REMEDY = "Run draf release verify; restore the file or prepare again."
IntArray = NDArray[np.int64]


class Found(NamedTuple):
    """Where a sample lies: row `place` of the index of a shard. table: (offset, size, crc32) of each part, then of the json."""

    shard: int
    place: int
    shard_index: ShardIndex
    table: list[list[int]]


class ShardReader:
    """Numbers the samples of one split 0..N-1 through its shards laid end to end in manifest order. Safe for several threads."""

    def __init__(self, release: Release, split: Split) -> None:
        self.release = release
        self.shards = release.shards(split)
        self._first = np.concatenate([[0], np.cumsum([shard.num_samples for shard in self.shards], dtype=np.int64)])
        self._indexes: SharedCache[int, ShardIndex] = SharedCache(INDEX_BYTES, lambda index: index.members.nbytes)
        self._suffixes = [extension(spec) for spec in release.schema.stored] + [META]
        self._limits = np.array([*(max_member_bytes(spec) for spec in release.schema.stored), MAX_META_BYTES])

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self._first[-1])

    def locate(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """The shard of every sample and its row in the shard's index."""
        shard = np.searchsorted(self._first, samples, side="right") - 1
        return shard, samples - self._first[shard]

    def find(self, samples: IntArray) -> list[Found | DataError]:
        """Where each of the samples lies, or why its shard can't be read.

        Raises:
            UnreachableError: the store does not answer.
        """
        shards, places = self.locate(samples)
        indexes = {shard: self._index_or_error(shard) for shard in set(shards.tolist())}
        found: list[Found | DataError] = []
        for shard, place in zip(shards.tolist(), places.tolist(), strict=True):
            index = indexes[shard]
            found.append(index if isinstance(index, DataError) else Found(shard, place, index, index.members[place].tolist()))
        return found

    def sample_number(self, shard: int, row: int) -> int:
        """The inverse of `locate`."""
        return int(self._first[shard]) + row

    def index(self, shard: int) -> ShardIndex:
        """Where the members of a shard are.

        Raises:
            DataError: its index is not there, damaged, or not that of this shard.
            UnreachableError: the store does not answer.
        """
        return self._indexes.get([shard], lambda _: [self._load_index(self.shards[shard])])[0]

    def has_index(self, shard: int) -> bool:
        """Whether `index` would answer at once."""
        return self._indexes.has(shard)

    def uids(self, samples: IntArray) -> IntArray:
        """The uids of samples."""
        located = zip(*self.locate(samples), strict=True)
        return np.array([self.index(int(shard)).uids[row] for shard, row in located], dtype=np.int64)

    def present(self, samples: IntArray) -> NDArray[np.bool_]:
        """Which modalities the samples have: bool (n, M)."""
        located = zip(*self.locate(samples), strict=True)
        num_modalities = len(self.release.schema.modalities)
        rows = [self.index(int(shard)).present[row, :num_modalities] for shard, row in located]
        return np.array(rows, dtype=np.bool_).reshape(len(rows), num_modalities)

    def error(self, shard: int, row: int, column: int, *, expected: str, found: str) -> DataError:
        """The error for one member, by part or, for the last column, the json; names release, shard and member."""
        name = f"{uid_name(int(self.index(shard).uids[row]))}.{self._suffixes[column]}"
        return self._broken(self.shards[shard], expected, found, name)

    def broken(self, shard: int, *, expected: str, found: str) -> DataError:
        """The error for a whole shard."""
        return self._broken(self.shards[shard], expected, found)

    def _index_or_error(self, shard: int) -> ShardIndex | DataError:
        try:
            return self.index(shard)
        except DataError as error:
            return error

    def _load_index(self, shard: ShardRecord) -> ShardIndex:
        index = self.release.index(shard)
        sizes, stops = index.members[:, :, SIZE], index.members[:, :, OFFSET] + index.members[:, :, SIZE]
        if index.num_samples != shard.num_samples or (stops > shard.size_bytes).any():
            raise self._broken(shard, "an index of this shard", "the index of another")
        if (sizes > self._limits).any():
            raise self._broken(shard, "members no larger than the schema allows", f"one of {int(sizes.max())} bytes")
        return index

    def _broken(self, shard: ShardRecord, expected: str, found: str, member: str = "") -> DataError:
        # A foreign tar is known by its place, and nobody but its owner can restore it.
        tar = f"shard {shard.sha256}" if shard.url is None else self.release.where_tar(shard)
        where = f"{self.release.pinned_url}: {tar}" + (f": {member}" if member else "")
        return DataError(explain(where, expected=expected, found=found, remedy=REMEDY if shard.url is None else CHANGED))


def runs(blocks: Sequence[int], longest: int) -> list[range]:
    """Ascending numbers as runs of neighbours, none longer than `longest`."""
    found: list[range] = []
    for block in blocks:
        last = found[-1] if found else range(-1, -1)
        if last.stop == block and len(last) < longest:
            found[-1] = range(last.start, block + 1)
        else:
            found.append(range(block, block + 1))
    return found
