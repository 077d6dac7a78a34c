"""Storage that refuses, is not there or is full: the message that the design asks for, its exit code, and nothing left half."""

import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from conftest import S3
from memory_source import KEY, MemorySource
from small_disk import small_disk

from draf_dist.data.prepare import prepare
from draf_dist.data.release import open_release
from draf_dist.errors import DrafError, SpecError, StorageFullError, UnreachableError
from draf_dist.storage import open_store


def opening(url: str) -> DrafError:
    """The error of opening a store, which must come within seconds and give no secret away."""
    start = time.monotonic()
    with pytest.raises(DrafError) as caught:
        open_store(url)
    assert time.monotonic() - start < 15
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "?") not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_refused_as_such(s3: S3, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "wrong-but-private")
    error = opening(f"{s3.url}/small")
    assert isinstance(error, UnreachableError)
    assert error.exit_code == 6
    assert "expected credentials that the store accepts" in str(error)
    assert "AWS_SECRET_ACCESS_KEY" in str(error)
    assert "wrong-but-private" not in str(error)


def test_a_missing_bucket_is_named_with_the_nearest_or_how_to_make_it(s3: S3) -> None:
    bucket = s3.url.removeprefix("s3://")
    error = opening(f"{s3.url[:-1]}x/small")
    assert isinstance(error, SpecError)
    assert error.exit_code == 2
    assert f"Did you mean s3://{bucket}?" in str(error)
    assert "Create it: aws s3 mb s3://quite-different" in str(opening("s3://quite-different"))
    with pytest.raises(SpecError, match="Did you mean"):
        prepare(MemorySource(), f"{s3.url[:-1]}x/small", subject_key=KEY)
    assert bucket[:-1] + "x" not in [entry["Name"] for entry in open_store(s3.url)._call("list_buckets")["Buckets"]]


def test_an_endpoint_where_nothing_listens_is_told_at_once(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    error = opening(s3.url)
    assert isinstance(error, UnreachableError)
    assert "127.0.0.1:9, found Connection refused" in str(error)


def test_an_endpoint_that_never_answers_is_given_up(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        assert "no answer in time" in str(opening(s3.url))


def test_an_endpoint_that_is_no_url_is_a_mistake_of_the_user(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    assert isinstance(opening(s3.url), SpecError)


def test_a_bucket_without_a_release_is_told_from_one_that_is_unfinished(s3: S3) -> None:
    with pytest.raises(SpecError, match="expected a release, found none"):
        open_release(s3.url)


LARGE = MemorySource(num_studies=1500)


def test_a_disk_that_fills_up_leaves_no_release_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with small_disk(tmp_path / "disk", 2) as disk:
        url = str(disk / "small")
        with pytest.raises(
            StorageFullError, match=r"shards/.*: expected room on the disk, found .* MiB free\. Free space"
        ) as caught:
            prepare(LARGE, url, subject_key=KEY, shard_size_bytes=300_000)
        assert caught.value.exit_code == 1
        with pytest.raises(SpecError, match="only the parts of an unfinished one"):
            open_release(url)
        store = open_store(url)
        whole = store.list()
        assert whole
        assert all(path.startswith("shards/") for path in whole)
        assert not [path for path in disk.rglob("*") if path.is_file() and str(path.relative_to(disk / "small")) not in whole]
        assert [path.name for path in tmp_path.iterdir()] == ["disk"]
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        assert len(prepare(LARGE, url, subject_key=KEY, shard_size_bytes=300_000).subjects()) == 1500
        assert set(whole) < set(store.list())


def test_a_temporary_disk_that_fills_up_is_told_and_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(StorageFullError, match=r"disk/draf-prepare-.*: expected room on the disk"):
            prepare(LARGE, str(tmp_path / "out"), subject_key=KEY)
        assert list(disk.iterdir()) == []
    assert not (tmp_path / "out").exists()
