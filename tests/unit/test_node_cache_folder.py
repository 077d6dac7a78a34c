"""The folder of the node cache: where it is, whose, and what is made of it when it is damaged or removed."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from cached_blocks import JOB, SIZE, Origin, content, get, key, lying

from draf_dist.data.node_cache import NodeCache, default_cache
from draf_dist.errors import SpecError


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    """Room for four blocks."""
    return NodeCache(tmp_path / "cache", 4 * SIZE)


def test_a_folder_that_is_not_ours_alone_is_refused(tmp_path: Path) -> None:
    own, link, file, shared = (tmp_path / name for name in ("own", "link", "file", "shared"))
    own.mkdir(mode=0o755)
    link.symlink_to(own)
    file.write_text("")
    shared.mkdir()
    shared.chmod(0o777)
    NodeCache(own, 1)
    for folder, found in ((link, "a link"), (file, "no folder"), (shared, r"one that others can write to \(mode 777\)")):
        with pytest.raises(SpecError, match=f"{folder}: expected a folder of this user alone, found {found}. Set DRAF_CACHE_DIR"):
            NodeCache(folder, 1)
    assert NodeCache(tmp_path / "a" / "new", 1).folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    if os.geteuid() == 0:
        os.chown(foreign, 12345, 12345)
    else:
        foreign = Path("/")
    with pytest.raises(SpecError, match="found one of the user"):
        NodeCache(foreign, 1)


def ruined(folder: Path) -> None:
    (folder / "index.sqlite").write_bytes(os.urandom(40_000))


def cut(folder: Path) -> None:
    os.truncate(folder / "index.sqlite", 9000)


def removed(folder: Path) -> None:
    (folder / "index.sqlite").unlink()


def emptied(folder: Path) -> None:
    (folder / "index.sqlite").write_bytes(b"")


def riddled(folder: Path) -> None:
    data = bytearray((folder / "index.sqlite").read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    (folder / "index.sqlite").write_bytes(data)


def of_another_version(folder: Path) -> None:
    connection = sqlite3.connect(folder / "index.sqlite")
    connection.execute("PRAGMA user_version = 77")
    connection.close()


DAMAGES = [ruined, cut, removed, emptied, riddled, of_another_version]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_index_is_made_anew_from_the_files(cache: NodeCache, damage: Callable[[Path], None]) -> None:
    with cache.lease(JOB, 0) as lease:
        get(lease, Origin(), [0, 1, 2], until=5)
    damage(cache.folder)
    origin, again = Origin(), NodeCache(cache.folder, cache.limit_bytes)
    with again.lease(JOB, 0) as lease:
        assert [block.read(0, SIZE) for block in get(lease, origin, [0, 1, 2], until=5)] == [content(key(n)) for n in range(3)]
        assert origin.calls == []
        assert again.size_bytes == 3 * SIZE


@pytest.mark.parametrize("damage", DAMAGES[:5], ids=lambda damage: damage.__name__)
def test_an_index_damaged_while_jobs_run_costs_them_nothing(cache: NodeCache, damage: Callable[[Path], None]) -> None:
    origin, other = Origin(), NodeCache(cache.folder, cache.limit_bytes)
    with cache.lease(JOB, 2 * SIZE) as lease, other.lease("another", 2 * SIZE) as second:
        get(lease, origin, [0, 1], until=5)
        get(second, origin, [2, 3], until=5)
        damage(cache.folder)
        second.advance(4)
        for until in (6, 7):
            get(second, origin, [2], until)
            get(lease, origin, [1], until)
        lease.advance(6)
        get(lease, origin, [4], until=9)
        assert set(lying(cache)) == {key(n) for n in (1, 2, 3, 4)}
        assert cache.size_bytes == other.size_bytes == 4 * SIZE
        with pytest.raises(SpecError):
            other.lease("third", 1)
    assert set(origin.counts.values()) == {1}


def test_a_folder_that_is_removed_while_a_job_runs_is_made_again(cache: NodeCache) -> None:
    origin = Origin()
    with cache.lease(JOB, 4 * SIZE) as lease:
        lease.advance(3)
        (block,) = get(lease, origin, [0], until=5)
        shutil.rmtree(cache.folder)
        assert get(lease, origin, [0], until=5)[0] is block
        get(lease, origin, [0, 1], until=9)
        assert origin.counts == {key(0): 2, key(1): 1}
        assert set(lying(cache)) == {key(0), key(1)}
        with pytest.raises(SpecError, match="this job needs 1 bytes, job plan-of-release-a 4.0 kB"):
            NodeCache(cache.folder, cache.limit_bytes).lease("another", 1)


def test_a_file_that_is_gone_or_cut_short_is_fetched_anew(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as lease:
        get(lease, Origin(), [0, 1, 2], until=5)
    files = sorted((cache.folder / "blocks").rglob(f"{key(0)[0]}-*"))
    files[0].unlink()
    os.truncate(files[1], 10)
    origin = Origin()
    with cache.lease(JOB, 0) as lease:
        assert cache.size_bytes == SIZE == sum(lying(cache).values())
        assert [block.read(0, SIZE) for block in get(lease, origin, [0, 1, 2], until=5)] == [content(key(n)) for n in range(3)]
        assert origin.calls == [[key(0), key(2)]]


def test_a_file_that_is_cut_short_while_jobs_run_is_fetched_anew_by_the_next_who_opens_it(cache: NodeCache) -> None:
    origin = Origin()
    with cache.lease(JOB, 0) as first, cache.lease(JOB, 0) as second:
        get(first, origin, [0, 1], until=5)
        (path,) = (cache.folder / "blocks").rglob(f"{key(0)[0]}-0")
        os.truncate(path, 10)
        assert [block.read(0, SIZE) for block in get(second, origin, [0, 1], until=5)] == [content(key(0)), content(key(1))]
        assert origin.calls == [[key(0), key(1)], [key(0)]]
        assert cache.size_bytes == 2 * SIZE == sum(lying(cache).values())


def test_a_file_without_an_entry_counts_and_foreign_files_are_left_alone(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as lease:
        get(lease, Origin(), [0], until=5)
    (cache.folder / "blocks" / "00" / f"{key(2)[0]}-1").write_bytes(content(key(2)))
    (cache.folder / "blocks" / "notes.txt").write_text("not ours")
    with cache.lease(JOB, 0) as lease:
        assert cache.size_bytes == 2 * SIZE
        get(lease, Origin(), [4, 6, 8, 10], until=5)
    assert set(lying_names(cache)) == {f"{key(n)[0]}-{key(n)[1]}" for n in (4, 6, 8, 10)} | {"notes.txt"}


def lying_names(cache: NodeCache) -> list[str]:
    return [path.name for path in (cache.folder / "blocks").rglob("*") if path.is_file()]


def test_a_forgotten_block_is_fetched_anew_once_however_many_found_it_damaged(cache: NodeCache) -> None:
    origin = Origin()
    with cache.lease(JOB, 0) as first, cache.lease(JOB, 0) as second:
        for lease in (first, second):
            get(lease, origin, [0, 1], until=5)
        (path,) = (cache.folder / "blocks").rglob(f"{key(0)[0]}-0")
        path.write_bytes(bytes(SIZE))
        for lease in (first, second):
            assert get(lease, origin, [0], until=5)[0].read(0, SIZE) == bytes(SIZE)
            lease.forget([key(0)])
            assert get(lease, origin, [0], until=5)[0].read(0, SIZE) == content(key(0))
    assert origin.counts == {key(0): 2, key(1): 1}
    assert cache.size_bytes == 2 * SIZE


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * 10**9), ("500MiB", 500 * 2**20), ("1.5 tib", 3 * 2**39), ("4096", 4096), (" 7 B", 7), ("2k", 2000)],
)
def test_the_environment_says_where_and_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("DRAF_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("DRAF_CACHE_BYTES", text)
    cache = default_cache()
    assert (cache.folder, cache.limit_bytes) == (tmp_path / "here", size)


@pytest.mark.parametrize("text", ["lots", "-5GB", "0", "5 G B", "1e9", "12XB", "GB"])
def test_a_size_that_is_none_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DRAF_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("DRAF_CACHE_BYTES", text)
    with pytest.raises(SpecError, match=f"^DRAF_CACHE_BYTES: expected a size such as 20GB, .*found '{text}'"):
        default_cache()


def test_by_default_half_of_the_disk_however_often_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRAF_CACHE_DIR", raising=False)
    monkeypatch.delenv("DRAF_CACHE_BYTES", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    free = [100]
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(200, 200 - free[0], free[0]))
    cache = default_cache()
    assert cache.folder == tmp_path / f"draf-cache-{os.geteuid()}"
    assert cache.limit_bytes == 50
    with cache.lease(JOB, 50) as lease:
        get(lease, lambda keys: [bytes(40) for _ in keys], [0], until=1)
    free[0] -= 40
    assert default_cache().limit_bytes == 50
