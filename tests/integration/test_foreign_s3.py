"""Foreign WebDataset tars on a real S3 server: indexed in several processes where they lie, and pinned."""

from pathlib import Path

import pytest
from conftest import S3
from foreign_tars import KEY, members_of, name, sample, source, write_tars

from draf_dist.data.foreign import prepare_foreign
from draf_dist.data.release import open_release
from draf_dist.data.verify import verify
from draf_dist.errors import DataError
from draf_dist.executor import Processes
from draf_dist.storage import open_store


def test_tars_in_a_bucket_are_indexed_there_and_told_when_they_change(s3: S3, tmp_path: Path) -> None:
    store = open_store(f"{s3.url}/tars")
    for path in write_tars(tmp_path / "tars").iterdir():
        store.write(path.name, path.read_bytes())
    url = f"{s3.url}/tars/wards-*.tar"
    made = prepare_foreign(source(url), f"{s3.url}/set", subject_key=KEY, executor=Processes(2))
    release = open_release(f"{s3.url}/set")
    assert release.version == made.version
    assert {shard.url for shard in release.manifest.shards} == {f"{s3.url}/tars/wards-{i:03d}.tar" for i in range(4)}
    assert not [path for path in release.store.list() if path.endswith(".tar")]
    secrets = [value for key, value in s3.environment.items() if "KEY" in key]
    assert secrets
    assert not any(secret.encode() in release.store.read(path) for path in release.store.list() for secret in secrets)
    report = verify(release)
    assert (report.num_samples, report.size_bytes) == (60, sum(path.stat().st_size for path in (tmp_path / "tars").iterdir()))
    contents = {content for _, content in members_of({name(i): sample(i) for i in range(60)})}
    for shard in release.shards("train"):
        (tars, path), index = release.tar_location(shard), release.index(shard)
        members = [member for i in range(index.num_samples) if (member := index.member(i, "cxr")) is not None]
        data = tars.read_ranges(path, [(member.offset, member.stop) for member in members])
        assert all(bytes(each) in contents for each in data)
    # One release whose index lies on a disk and whose tars do not.
    local = prepare_foreign(source(url), str(tmp_path / "set"), subject_key=KEY)
    assert local.manifest.shards == release.manifest.shards
    store.write("wards-001.tar", store.read("wards-001.tar").replace(b"s0015", b"s9915"))
    with pytest.raises(DataError, match=r"wards-001\.tar: .*run draf prepare again"):
        verify(local)
