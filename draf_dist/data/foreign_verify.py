"""Whether a foreign tar is still what was indexed: one pass over its bytes, for all shards that point to it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from draf_dist.data.foreign_walk import BrokenTarError, Entry, TarStream, walk
from draf_dist.data.release import CHANGED, Release
from draf_dist.data.shards import ABSENT, OFFSET, Member
from draf_dist.errors import DataError, explain
from draf_dist.schema.identity import uid_name
from draf_dist.schema.release import ShardRecord


@dataclass
class ForeignSample:
    """One sample as an index has it. members: modality -> its bytes, those that were written."""

    shard: ShardRecord
    uid: int
    site: int
    label: int
    names: frozenset[str]
    members: dict[str, bytes] = field(default_factory=dict)


def read_foreign(release: Release, shards: Sequence[ShardRecord]) -> Iterator[ForeignSample]:
    """The samples of shards that point to one tar, in the order in which they lie in it, and then the tar as a whole.

    Raises:
        DataError: the tar is not the one that was indexed; names it and, where one is damaged, the member.
        UnreachableError: its store does not answer, or refuses the credentials.
    """
    record, where = shards[0], release.where_tar(shards[0])
    store, path = release.tar_location(record)
    size = store.size(path)
    if size != record.size_bytes:
        found = "nothing" if size is None else f"{size} bytes"
        raise _changed(where, f"the tar of {record.size_bytes} bytes that was indexed", found)
    places = _places(release, shards)
    with TarStream(store, path, size) as stream:
        try:
            for entry in walk(stream):
                if (place := places.pop(entry.offset, None)) is not None and (sample := _read(place, entry, stream, where)):
                    yield sample
        except BrokenTarError as error:
            raise _changed(where, "the tar that was indexed", str(error)) from error
        if places or stream.sha256() != record.sha256:
            raise _changed(where, f"the tar with sha256 {record.sha256[:16]}... that was indexed", "other bytes")


@dataclass(frozen=True)
class _Place:
    """What an index says of one member."""

    sample: ForeignSample
    modality: str
    size: int
    crc32: int


def _places(release: Release, shards: Sequence[ShardRecord]) -> dict[int, _Place]:
    """By offset, all members that the indexes of these shards name."""
    places: dict[int, _Place] = {}
    for shard in shards:
        index = release.index(shard)
        assert index.sites is not None  # Release.index refuses the index of an own shard here
        assert index.labels is not None
        if index.num_samples != shard.num_samples:
            where = f"{release.pinned_url}: index of {release.where_tar(shard)}"
            raise _changed(where, f"{shard.num_samples} samples", f"{index.num_samples}")
        for i, members in enumerate(index.members[:, :-1].tolist()):
            found = {name: member for name, member in zip(index.modalities, members, strict=True) if member[OFFSET] != ABSENT}
            sample = ForeignSample(shard, int(index.uids[i]), int(index.sites[i]), int(index.labels[i]), frozenset(found))
            places |= {offset: _Place(sample, name, size, crc32) for name, (offset, size, crc32) in found.items()}
    return places


def _read(place: _Place, entry: Entry, stream: TarStream, where: str) -> ForeignSample | None:
    """The sample, once the last of its members has come."""
    sample, member = place.sample, Member(entry.offset, place.size, place.crc32)
    data = stream.read(entry.size) if entry.is_file and entry.size == place.size else b""
    if not member.matches(data):
        expected = f"{place.size} bytes with crc32 {place.crc32:08x}"
        raise _changed(f"{where}: {uid_name(sample.uid)}.{place.modality}", expected, "other bytes")
    sample.members[place.modality] = data
    return sample if sample.members.keys() == sample.names else None


def _changed(where: str, expected: str, found: str) -> DataError:
    return DataError(explain(where, expected=expected, found=found, remedy=CHANGED))
