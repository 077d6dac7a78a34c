"""What of a delivery the release already holds: the same studies, and images that belong to somebody else.

Only the indexes of the shards are read, and of the shards the few members that may be equal.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from draf_dist.data.decode import UndecodableError, decode_study
from draf_dist.data.gather import LISTED_LEAKS, Row, Spool
from draf_dist.data.permutation import IntArray
from draf_dist.data.release import Release
from draf_dist.data.shards import META, SIZE, Member, ShardIndex, extension
from draf_dist.data.stats import decode_member
from draf_dist.errors import DataError, explain, together
from draf_dist.schema.identity import uid_name
from draf_dist.schema.modality import DataSchema, ImageSpec, VolumeSpec
from draf_dist.schema.release import ShardRecord

# crc32 in the lower half of an image's key, its size in the upper.
_CRC_BITS = 32
Members = Mapping[str, bytes]


@dataclass
class Known:
    """new: rows that the release does not have. same: those that it has, with the same content. changed: with other content."""

    new: list[Row] = field(default_factory=list)
    same: list[Row] = field(default_factory=list)
    changed: list[Row] = field(default_factory=list)


def compare(release: Release, spool: Spool, rows: Sequence[Row]) -> Known:
    """Holds the rows of a delivery against a release.

    Content is compared decoded (pixels, values, label, mask, quality), so another version of an encoder makes no study another
    one. Images of new studies are compared as they are stored, byte by byte, with all of the release.

    Raises:
        DataError: an image of a new study that the release holds for another subject; or a broken release.
    """
    subjects = release.subjects()
    owner = dict(zip(subjects["uid"].to_pylist(), subjects["subject"].to_pylist(), strict=True))
    known = Known(new=[row for row in rows if row.uid not in owner])
    again = {row.uid: row for row in rows if row.uid in owner}
    uids = np.array(sorted(again), dtype=np.int64)
    images = _Images(release.schema, spool, known.new)
    problems: list[str] = []
    for shard in release.manifest.shards:
        index = release.index(shard)
        for i in np.flatnonzero(np.isin(index.uids, uids)).tolist():
            row = again[int(index.uids[i])]
            stored = _members(release, shard, index, i)
            (known.same if _same_content(release.schema, stored, spool.read(row)) else known.changed).append(row)
        problems += images.claimed(release, shard, index, owner)
    if problems:
        more = len(problems) - LISTED_LEAKS
        raise DataError(together([*problems[:LISTED_LEAKS], *([f"... and {more} more."] if more > 0 else [])]))
    return known


class _Images:
    """The images of new studies, by size and crc32, which every index of the release has of its own images."""

    def __init__(self, schema: DataSchema, spool: Spool, rows: Sequence[Row]) -> None:
        self._specs = [spec for spec in schema.modalities if isinstance(spec, ImageSpec | VolumeSpec)]
        self._spool = spool
        self._rows: dict[int, list[tuple[Row, str]]] = {}
        for row in rows:
            members = spool.read(row) if any(spec.name in row.present for spec in self._specs) else {}
            for spec in self._specs:
                if spec.name in row.present:
                    self._rows.setdefault(_key(members[extension(spec)]), []).append((row, extension(spec)))
        self._keys = np.array(sorted(self._rows), dtype=np.int64)

    def claimed(self, release: Release, shard: ShardRecord, index: ShardIndex, owner: Mapping[int, str]) -> Iterator[str]:
        """One problem for every image of another subject in the shard."""
        for spec in self._specs:
            column = index.modalities.index(spec.name)
            for i in np.flatnonzero(np.isin(_keys(index, column), self._keys)).tolist():
                member = index.member(i, spec.name)
                if member is None:
                    continue
                uid = int(index.uids[i])
                content = _read(release, shard, uid, member)
                for row, suffix in self._rows[_key(content)]:
                    if row.subject != owner[uid] and self._spool.read(row)[suffix] == content:
                        yield explain(
                            f"{spec.name} of study {uid_name(row.uid)} (site {row.site})",
                            expected="images that belong to one subject",
                            found=f"the image that the release has of another subject's study {uid_name(uid)}",
                            remedy="Find out whose it is; nothing was written.",
                        )


def _key(content: bytes) -> int:
    return (len(content) << _CRC_BITS) | zlib.crc32(content)


def _keys(index: ShardIndex, column: int) -> IntArray:
    """The keys of one modality's members, int64 (n,); negative where absent."""
    members = index.members[:, column]
    return np.asarray((members[:, SIZE] << _CRC_BITS) | members[:, SIZE + 1])


def _members(release: Release, shard: ShardRecord, index: ShardIndex, i: int) -> Members:
    """The files of one stored sample, by what follows the uid in their names."""
    uid = int(index.uids[i])
    found = {extension(spec): index.member(i, spec.name) for spec in release.schema.stored}
    return {
        suffix: _read(release, shard, uid, member)
        for suffix, member in {**found, META: index.meta(i)}.items()
        if member is not None
    }


def _read(release: Release, shard: ShardRecord, uid: int, member: Member) -> bytes:
    store, path = release.tar_location(shard)
    data = store.read_range(path, member.offset, member.stop)
    if not member.matches(data):
        where = f"{release.where_tar(shard)}: {uid_name(uid)}"
        raise _broken(where, "other bytes")
    return data


def _same_content(schema: DataSchema, stored: Members, delivered: Members) -> bool:
    if stored.keys() != delivered.keys():
        return False
    if stored == delivered:
        return True
    try:
        mine, theirs = decode_study(stored[META]), decode_study(delivered[META])
        if (mine.label, mine.quality) != (theirs.label, theirs.quality):
            return False
        for spec in schema.stored:
            if extension(spec) not in stored:
                continue
            if isinstance(spec, VolumeSpec):
                # The same voxels may lie in other bytes: another version of the library that packs them.
                had, has = (decode_member(members[extension(spec)], spec).voxels_sha256 for members in (stored, delivered))
                if had != has:
                    return False
            else:
                one, two = (decode_member(members[extension(spec)], spec) for members in (stored, delivered))
                if not np.array_equal(one, two, equal_nan=not isinstance(spec, ImageSpec)):
                    return False
    except UndecodableError as error:
        raise _broken("a study of the release", str(error)) from error
    return True


def _broken(where: str, found: str) -> DataError:
    remedy = "Run draf release verify on the release first."
    return DataError(explain(where, expected="a member as its index has it", found=found, remedy=remedy))
