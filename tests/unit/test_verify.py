import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forged_release import forged
from memory_delivery import EAST, MemoryDelivery, sealed
from memory_source import KEY, SCHEMA, MemorySource

from draf_dist.continual.ingest import ingest
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release, index_path, load_release, open_release, release_path, tar_path
from draf_dist.data.shards import Member, ShardWriter, encode_index, extension, index_tar
from draf_dist.data.verify import verify
from draf_dist.errors import DataError
from draf_dist.schema.identity import uid_name
from draf_dist.schema.release import ShardRecord


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return prepare(MemorySource(), str(tmp_path / "small"), subject_key=KEY, shard_size_bytes=40_000)


def damaged(release: Release, path: str, change: Callable[[bytearray], bytes | bytearray]) -> None:
    release.store.write(path, bytes(change(bytearray(release.store.read(path)))))


def flip(position: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[position] ^= 1
        return data

    return change


def test_a_whole_release_passes_and_is_counted(release: Release) -> None:
    seen = []
    report = verify(release, on_progress=lambda done, total: seen.append((done, total)))
    studies = list(MemorySource().studies())
    assert report.num_samples == 60
    assert report.num_members == sum(1 + len(study.inputs) for study in studies)
    assert report.num_subjects == len({study.subject for study in studies})
    assert report.size_bytes == sum(shard.size_bytes for shard in release.manifest.shards)
    assert seen[-1] == (60, 60)
    assert len(seen) == report.num_shards > 4


@pytest.mark.parametrize("name", ["cxr", "vitals", "history", "json"])
def test_one_flipped_bit_is_named_by_shard_and_member(release: Release, name: str) -> None:
    shard = release.shards("train")[1]
    index = release.index(shard)
    suffix = {spec.name: extension(spec) for spec in SCHEMA.modalities}.get(name, "json")
    i = next(i for i in range(3, index.num_samples) if name == "json" or index.member(i, name))
    member = index.meta(i) if name == "json" else index.member(i, name)
    assert isinstance(member, Member)
    damaged(release, tar_path(shard), flip(member.offset + member.size // 2))
    with pytest.raises(
        DataError, match=rf"{shard.sha256}\.tar: {uid_name(int(index.uids[i]))}\.{suffix}: expected .* crc32"
    ) as caught:
        verify(release)
    assert caught.value.exit_code == 3


def test_a_shard_cut_short_is_named_by_its_first_missing_member(release: Release) -> None:
    shard = release.shards("val")[0]
    index = release.index(shard)
    middle = index.num_samples // 2
    damaged(release, tar_path(shard), lambda data: data[: index.meta(middle).offset + 3])
    with pytest.raises(DataError, match=rf"{uid_name(int(index.uids[middle]))}\.\S*: .*cut short"):
        verify(release)


def test_damage_between_members_is_found(release: Release) -> None:
    shard = release.shards("train")[0]
    damaged(release, tar_path(shard), flip(release.index(shard).meta(0).offset - 512 + 136))  # the time in a tar header
    with pytest.raises(DataError, match=f"{shard.sha256}.*no member is damaged"):
        verify(release)


@pytest.mark.parametrize("place", [tar_path, index_path])
def test_a_missing_file_of_a_shard_is_named(release: Release, place: Callable[[ShardRecord], str]) -> None:
    shard = release.shards("test")[0]
    release.store.delete(place(shard))
    with pytest.raises(DataError, match=rf"{place(shard)}: .* found nothing"):
        verify(release)


@pytest.mark.parametrize("name", ["schema.json", "stats.json", "subjects.parquet", "quarantine.json", "release.json"])
def test_a_changed_file_of_the_release_is_named(release: Release, name: str) -> None:
    damaged(release, release_path(release.version, name), lambda data: bytes(data).replace(b"1", b"2", 1) + b" ")
    with pytest.raises(DataError, match=name):
        verify(open_release(release.url))


@pytest.mark.parametrize("kind", ["tar", "idx", "schema.json", "stats.json", "quarantine.json"])
def test_what_was_lost_is_written_again_by_the_same_prepare(release: Release, kind: str) -> None:
    lost = next(path for path in release.store.list() if path.endswith(kind))
    release.store.delete(lost)
    with pytest.raises(DataError, match="run draf prepare again on the same export: it writes what is missing"):
        verify(open_release(release.url))
    again = prepare(MemorySource(), release.url, subject_key=KEY, shard_size_bytes=40_000)
    assert again.version == release.version
    verify(again)


def test_a_head_that_leads_nowhere_is_told(release: Release) -> None:
    release.store.delete(release_path(release.version, "release.json"))
    with pytest.raises(DataError, match=f"HEAD.json: .* found {release.version}, which has no release.json"):
        open_release(release.url)
    with pytest.raises(DataError, match=r"HEAD\.json"):
        prepare(MemorySource(), release.url, subject_key=KEY)


def test_a_changed_index_is_named(release: Release) -> None:
    shard = release.shards("train")[0]
    damaged(release, index_path(shard), flip(-1))
    with pytest.raises(DataError, match=rf"{shard.sha256}\.idx: expected sha256"):
        verify(release)


def moved(release: Release, row: int, **values: str) -> bytes:
    table = release.subjects().to_pylist()
    table[row] |= values
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table, schema=release.subjects().schema), buffer)
    return buffer.getvalue()


def test_a_subject_in_two_splits_is_a_leak(release: Release) -> None:
    rows = release.subjects().to_pylist()
    twice = next(
        i for i, row in enumerate(rows) if sum(r["subject"] == row["subject"] for r in rows) == 2 and row["split"] != "ood"
    )
    other = "val" if rows[twice]["split"] != "val" else "test"
    with pytest.raises(DataError, match=r"expected every subject in one split, found .*Do not train on this release"):
        verify(forged(release, {"subjects.parquet": moved(release, twice, split=other)}))


def test_a_held_out_site_outside_ood_is_a_leak(release: Release) -> None:
    with pytest.raises(DataError, match=r"subjects of held-out sites, and no others, in ood, found study \w{16} of site"):
        verify(forged(release, held_out_sites=("north",)))


def test_a_row_that_contradicts_its_sample_is_named(release: Release) -> None:
    rows = release.subjects().to_pylist()
    label = "died" if rows[5]["label"] == "survived" else "survived"
    with pytest.raises(DataError, match=rf"{uid_name(rows[5]['uid'])}\.json: expected the subject, site, label and split"):
        verify(forged(release, {"subjects.parquet": moved(release, 5, label=label)}))


def test_statistics_of_other_data_are_found(release: Release) -> None:
    stats = release.stats.model_copy(update={"images": {"cxr": release.stats.images["cxr"].model_copy(update={"mean": 1.0})}})
    with pytest.raises(DataError, match=r"stats.json to be the statistics of the training split"):
        verify(forged(release, {"stats.json": stats.model_dump_json().encode()}))


def test_counts_and_receipts_that_are_not_those_of_the_shards_are_found(release: Release) -> None:
    counts = release.manifest.model_dump()["counts"]
    counts["north"]["train"]["cxr"] += 1
    with pytest.raises(DataError, match=r"counts of release.json"):
        verify(forged(release, counts=counts))
    receipts = release.manifest.model_dump()["receipts"]
    with pytest.raises(DataError, match=r"receipt of train"):
        verify(forged(release, receipts=receipts | {"train": receipts["val"]}))


def test_a_shard_left_out_or_named_twice_is_found(release: Release) -> None:
    shards = release.manifest.shards
    with pytest.raises(DataError, match="60 studies, each once"):
        verify(forged(release, shards=shards[1:]))
    with pytest.raises(DataError, match="60 studies, each once"):
        verify(forged(release, shards=(*shards, shards[0])))


def rewritten(release: Release, change: Callable[[str, bytes], bytes]) -> Release:
    """The release with every member of its first shard changed, digests and index made to fit."""
    old = release.manifest.shards[0]
    tar, index = release.store.read(tar_path(old)), release.index(old)
    assert (path := release.store.local_path("new")) is not None
    with ShardWriter(path) as writer:
        for i, uid in enumerate(index.uids.tolist()):
            members = {"json": index.meta(i)} | {extension(s): m for s in SCHEMA.modalities if (m := index.member(i, s.name))}
            writer.write(uid, {suffix: change(suffix, tar[m.offset : m.stop]) for suffix, m in members.items()})
    data, new_index = path.read_bytes(), encode_index(index_tar(path, SCHEMA))
    digest, index_digest = (hashlib.sha256(content).hexdigest() for content in (data, new_index))
    shard = old.model_copy(update={"sha256": digest, "index_sha256": index_digest, "size_bytes": len(data)})
    release.store.write(tar_path(shard), data)
    release.store.write(index_path(shard), new_index)
    return forged(release, shards=(shard, *release.manifest.shards[1:]))


def test_one_image_under_two_subjects_is_a_leak(release: Release) -> None:
    shard = release.shards("val")[0]
    index = release.index(shard)
    member = next(m for i in range(index.num_samples) if (m := index.member(i, "cxr")))
    image = release.store.read_range(tar_path(shard), member.offset, member.stop)
    with pytest.raises(
        DataError, match=r"cxr.png: expected an image that belongs to one subject, found the image of study \w{16} \(split train\)"
    ):
        verify(rewritten(release, lambda suffix, data: image if suffix == "cxr.png" else data))


def test_a_member_that_is_whole_but_not_what_the_schema_says_is_named(release: Release) -> None:
    with pytest.raises(DataError, match=r"history.npy: expected the table of schema.json"):
        verify(rewritten(release, lambda suffix, data: data[:-4] if suffix == "history.npy" else data))
    with pytest.raises(DataError, match=r"cxr.png: expected the image of schema.json, found a PNG of"):
        verify(rewritten(release, lambda suffix, data: b"\x89PNG\r\n\x1a\n" + bytes(40) if suffix == "cxr.png" else data))
    with pytest.raises(DataError, match=r"\.json: expected the json of a sample"):
        verify(rewritten(release, lambda suffix, data: b"{}" if suffix == "json" else data))


def test_uids_may_be_as_large_as_63_bits(release: Release) -> None:
    assert np.max(release.subjects()["uid"].to_numpy()) > 2**60


@pytest.fixture
def child(release: Release, tmp_path: Path) -> Release:
    source, folder = MemoryDelivery(schema=EAST), sealed(tmp_path / "in")
    return ingest(source, folder, release.url, subject_key=KEY).release


def child_of(child: Release, **changes: object) -> Release:
    return forged(child, parent=child.manifest.parent, **changes)  # type: ignore[arg-type]


def test_a_child_that_agrees_with_its_parent_passes(child: Release) -> None:
    assert verify(child_of(child)).num_samples == 80


def test_a_child_with_its_parents_shards_in_another_order_is_found(child: Release) -> None:
    first, second, *rest = child.manifest.shards
    with pytest.raises(DataError, match=rf"the deliveries and shards of its parent {child.manifest.parent}, then its own"):
        verify(child_of(child, shards=(second, first, *rest)))


def test_a_delivery_that_is_named_twice_or_counted_wrongly_is_found(child: Release) -> None:
    (record,) = child.manifest.deliveries
    with pytest.raises(DataError, match="every delivery once, found one twice"):
        verify(child_of(child, deliveries=(record, record)))
    with pytest.raises(DataError, match="expected 19 studies of delivery first, found 20"):
        verify(child_of(child, deliveries=(record.model_copy(update={"num_studies": 19}),)))


def test_an_old_subject_in_another_split_is_a_leak(child: Release) -> None:
    parent = load_release(child.url, child.store, str(child.manifest.parent))
    old = {row["uid"] for row in parent.subjects().to_pylist() if row["split"] == "val"}
    row = next(i for i, row in enumerate(child.subjects().to_pylist()) if row["uid"] in old)
    with pytest.raises(DataError, match=r"as it was, in the same split, found another\. Do not train"):
        verify(child_of(child, parts={"subjects.parquet": moved(child, row, split="test")}))


def test_sums_of_other_data_are_found(child: Release) -> None:
    sums = child.sums()
    assert sums is not None
    other = sums.model_copy(update={"images": {"cxr": sums.images["cxr"].model_copy(update={"total": 1})}})
    with pytest.raises(DataError, match=r"sums\.json to be the sums of the training split"):
        verify(child_of(child, parts={"sums.json": other.model_dump_json().encode()}))
