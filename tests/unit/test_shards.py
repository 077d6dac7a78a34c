import hashlib
import io
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from memory_source import KEY, SCHEMA, MemorySource

from draf_dist.data.encode import resized
from draf_dist.data.prepare import prepare
from draf_dist.data.release import tar_path
from draf_dist.data.shards import (
    META,
    SampleMeta,
    ShardIndex,
    ShardWriter,
    cut,
    decode_index,
    decode_meta,
    encode_index,
    encode_meta,
    extension,
    index_tar,
)
from draf_dist.errors import DataError
from draf_dist.schema.identity import study_uid, uid_name

CXR, VITALS, HISTORY = (extension(spec) for spec in SCHEMA.modalities)
SAMPLES = {
    5: {CXR: b"picture", VITALS: b"v" * 700, META: b"{}"},
    2**63 - 1: {HISTORY: b"", META: b"[]"},
}


def write(path: Path) -> Path:
    with ShardWriter(path) as writer:
        for uid, members in SAMPLES.items():
            writer.write(uid, members)
    return path


def test_the_index_gives_the_bytes_of_every_member(tmp_path: Path) -> None:
    tar = write(tmp_path / "a.tar")
    data, index = tar.read_bytes(), index_tar(tar, SCHEMA)
    assert index.uids.tolist() == list(SAMPLES)
    for i, members in enumerate(SAMPLES.values()):
        for spec in SCHEMA.modalities:
            member = index.member(i, spec.name)
            assert (member is None) == (extension(spec) not in members)
            if member is not None:
                assert data[member.offset : member.stop] == members[extension(spec)]
                assert member.matches(members[extension(spec)])
                assert not member.matches(b"other")
        start, stop = index.extent(i)
        assert data[index.meta(i).offset : index.meta(i).stop] == members[META]
        assert all(content in data[start:stop] for content in members.values())
    assert index.present.tolist() == [[True, True, False], [False, False, True]]


def test_the_same_samples_give_the_same_tar(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.tar"), write(tmp_path / "b.tar")
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in tar} == {(0, 0, 0, "", "")}


def test_any_webdataset_reader_reads_a_shard(tmp_path: Path) -> None:
    tar = write(tmp_path / "a.tar")
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert [int(sample["__key__"], 16) for sample in samples] == list(SAMPLES)
    assert samples[0]["cxr.png"] == b"picture"


def test_readers_of_webdataset_that_split_the_shards_see_every_sample_once_and_decoded(tmp_path: Path) -> None:
    release = prepare(MemorySource(), str(tmp_path), subject_key=KEY, shard_size_bytes=10_000)
    tars = [str(release.store.local_path(tar_path(shard))) for shard in release.manifest.shards]
    assert len(tars) > 6
    seen = {}
    for rank in range(3):
        pipeline = webdataset.DataPipeline(
            webdataset.SimpleShardList(tars),
            lambda shards, rank=rank: islice(shards, rank, None, 3),
            webdataset.tarfile_to_samples(),
            webdataset.decode("l8"),
        )
        for one in pipeline:
            assert one["__key__"] not in seen
            seen[one["__key__"]] = one
    studies = {uid_name(study_uid(KEY, site=s.site, subject=s.subject, anchor=s.anchor)): s for s in MemorySource().studies()}
    assert set(seen) == set(studies)
    for key, study in studies.items():
        assert seen[key]["json"]["site"] == study.site
        for spec in SCHEMA.modalities:
            assert (extension(spec) in seen[key]) == (spec.name in study.inputs)
        if "cxr" in study.inputs:
            assert np.array_equal(seen[key]["cxr.png"], resized(study.inputs["cxr"], SCHEMA.modalities[0])[0])
        if "vitals" in study.inputs:
            assert np.array_equal(seen[key]["vitals.npy"], study.inputs["vitals"], equal_nan=True)


def test_an_index_survives_the_disk(tmp_path: Path) -> None:
    index = index_tar(write(tmp_path / "a.tar"), SCHEMA)
    again = decode_index(encode_index(index), SCHEMA.names)
    assert np.array_equal(again.uids, index.uids)
    assert np.array_equal(again.members, index.members)


def test_the_index_of_our_own_tars_keeps_its_bytes() -> None:
    members = [[[512, 7, 99], [-1, -1, -1], [1536, 2, 5]], [[2560, 7, 98], [3584, 9, 1], [4608, 2, 6]]]
    index = ShardIndex(("cxr", "labs"), np.array([3, 2**63 - 1]), np.array(members))
    # As the release of before any foreign tar wrote it: another one would be another version of every data set.
    expected = "21336114a9b38b98d205e999de5ec44646f6aab99965eaf99c099d42929d26a6"
    assert hashlib.sha256(encode_index(index)).hexdigest() == expected


def foreign_index(sites: list[int], labels: list[int]) -> ShardIndex:
    members = np.array([[[512, 7, 99], [-1, -1, -1], [-1, -1, -1]], [[-1, -1, -1], [3584, 9, 1], [-1, -1, -1]]])
    return ShardIndex(("cxr", "labs"), np.array([9, 3]), members, np.array(sites), np.array(labels))


def test_the_index_of_a_foreign_tar_says_site_and_label_and_has_no_json() -> None:
    index = foreign_index([1, 0], [0, 2])
    again = decode_index(encode_index(index), ("cxr", "labs"))
    assert again.is_foreign
    assert (again.uids.tolist(), again.sites.tolist(), again.labels.tolist()) == ([9, 3], [1, 0], [0, 2])
    assert np.array_equal(again.members, index.members)
    assert again.present.tolist() == [[True, False], [False, True]]
    with pytest.raises(ValueError, match="without its site or label"):
        decode_index(encode_index(foreign_index([1, -1], [0, 2])), ("cxr", "labs"))


def test_an_index_of_other_modalities_is_refused(tmp_path: Path) -> None:
    data = encode_index(index_tar(write(tmp_path / "a.tar"), SCHEMA))
    with pytest.raises(ValueError, match="expected int64"):
        decode_index(data, ("cxr",))


def test_a_pickle_is_no_index() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="another type"):
        decode_index(buffer.getvalue(), SCHEMA.names)


def test_a_member_that_does_not_belong_is_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write(1, {"cxr.pyd": b"", META: b"{}"})
    with pytest.raises(DataError, match=r"0000000000000001\.cxr\.pyd"):
        index_tar(tmp_path / "a.tar", SCHEMA)


def test_the_json_of_a_sample_says_names_and_nothing_else() -> None:
    meta = SampleMeta(uid=255, subject="f" * 32, site="north", label="died", quality={"cxr": 0.25})
    assert encode_meta(
        meta
    ) == b'{"label":"died","quality":{"cxr":0.25},"site":"north","subject":"%s","uid":"00000000000000ff"}' % (b"f" * 32)
    assert decode_meta(encode_meta(meta)) == meta
    with pytest.raises(ValueError, match="not the json"):
        decode_meta(b'{"uid":"00","name":"x"}')


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 100))
def test_runs_cover_everything_once_and_fit(sizes: list[int], limit: int) -> None:
    runs = cut(sizes, limit)
    assert [i for run in runs for i in range(len(sizes))[run]] == list(range(len(sizes)))
    assert all(sum(sizes[run]) <= limit or run.stop - run.start == 1 for run in runs)
    assert all(run.stop > run.start for run in runs)
