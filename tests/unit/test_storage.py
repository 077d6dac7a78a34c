import errno
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from draf_dist.errors import SpecError, StorageFullError, UnreachableError
from draf_dist.storage import LocalStore, MissingError, Store, open_store
from draf_dist.storage.local import UNFINISHED, room_on


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "data set"))


def test_what_is_written_is_read(store: Store) -> None:
    store.write("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 2, 5) == b"234"
    assert store.read_ranges("a/b.bin", [(0, 1), (8, 99), (50, 60)]) == [b"0", b"89", b""]
    assert (store.size("a/b.bin"), store.size("a"), store.size("c")) == (10, None, None)
    assert store.list() == store.list("a") == ["a/b.bin"]
    assert store.list("b") == []
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert not store.exists("a/b.bin")


def test_a_file_url_and_a_path_are_the_same_store(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/x%20y").write("a", b"1")
    assert open_store(str(tmp_path / "x y")).read("a") == b"1"


def test_a_local_object_can_be_mapped(store: Store, tmp_path: Path) -> None:
    store.upload("a", _file(tmp_path / "source", b"content"))
    assert store.local_path("a").read_bytes() == b"content"


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("read", [lambda s: s.read("x"), lambda s: s.read_range("x", 0, 1), lambda s: s.read_with_etag("x")])
def test_reading_what_is_not_there_names_it(store: Store, read: Callable[[Store], object]) -> None:
    with pytest.raises(MissingError, match="data set/x: expected a file, found nothing"):
        read(store)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x"])
def test_a_path_can_not_leave_its_store(store: Store, path: str) -> None:
    with pytest.raises(SpecError, match="inside the store"):
        store.read(path)


@pytest.mark.parametrize("url", ["gs://bucket/x", "pipe:cat://x", "s3://", "http://host/x"])
def test_a_scheme_outside_the_list_is_refused(url: str) -> None:
    with pytest.raises(SpecError, match="expected a local path, file:///path or s3://bucket/prefix"):
        open_store(url)


def test_a_folder_that_must_exist_is_asked_for_with_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    with pytest.raises(SpecError, match="Beside it are: release"):
        open_store(str(tmp_path / "relaese"), must_exist=True)
    with pytest.raises(SpecError, match="found a file"):
        open_store(str(_file(tmp_path / "file", b"")))


def test_creating_twice_keeps_the_first(store: Store) -> None:
    assert store.create("HEAD", b"first")
    assert not store.create("HEAD", b"second")
    assert store.read("HEAD") == b"first"


def test_swapping_needs_the_content_that_was_read(store: Store) -> None:
    assert not store.swap("HEAD", b"x", "etag")
    store.create("HEAD", b"one")
    _, etag = store.read_with_etag("HEAD")
    assert store.swap("HEAD", b"two", etag)
    assert not store.swap("HEAD", b"three", etag)
    assert store.read("HEAD") == b"two"


def race(store: Store, act: Callable[[int], bool], num: int = 8) -> list[int]:
    """Which of the callers were told that they won."""
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


def test_one_of_eight_racing_writers_wins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = LocalStore._publish

    def slowly(store: LocalStore, temporary: Path, path: str) -> None:
        time.sleep(0.02)  # so that the others arrive between the look and the write
        publish(store, temporary, path)

    monkeypatch.setattr(LocalStore, "_publish", slowly)
    (winner,) = race(store, lambda i: store.create("HEAD", b"%d" % i))
    assert store.read("HEAD") == b"%d" % winner
    _, etag = store.read_with_etag("HEAD")
    (winner,) = race(store, lambda i: store.swap("HEAD", b"swapped %d" % i, etag))
    assert store.read("HEAD") == b"swapped %d" % winner


def test_a_file_that_is_still_written_is_nobodys(store: Store, tmp_path: Path) -> None:
    store.write("a", b"")
    (tmp_path / "data set" / f"{UNFINISHED}1-2").write_bytes(b"half")
    assert store.list() == ["a"]


def test_a_write_that_fails_leaves_the_old_content_and_no_rest(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.write("a", b"old")
    monkeypatch.setattr(os, "fsync", fails)
    for act in (lambda: store.write("a", b"new"), lambda: store.upload("a", _file(tmp_path / "new", b"new"))):
        with pytest.raises(StorageFullError, match=r"data set/a: expected room on the disk, found .* MiB free"):
            act()
    assert store.read("a") == b"old"
    assert [path.name for path in (tmp_path / "data set").iterdir()] == ["a"]


def test_a_store_that_may_not_be_written_says_so(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        with pytest.raises(UnreachableError, match="expected"):
            LocalStore(Path("/sys/kernel")).write("x", b"")
    else:
        tmp_path.chmod(0o500)
        with pytest.raises(UnreachableError, match="permission to read and write"):
            open_store(str(tmp_path)).write("x", b"")


def test_a_full_device_is_told_from_other_errors(tmp_path: Path) -> None:
    with pytest.raises(StorageFullError, match="MiB free"), room_on(tmp_path), Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"x")
    with pytest.raises(FileNotFoundError), room_on(tmp_path):
        (tmp_path / "x").read_bytes()


def test_a_store_goes_to_another_process(store: Store) -> None:
    store.write("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"
