"""The node cache within one process: what is fetched, for whom, how often, and how it is read."""

import random
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cached_blocks import JOB, SIZE, Origin, content, get, key, lying

from draf_dist.data import node_cache_lease
from draf_dist.data.node_cache import BlockKey, NodeCache


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    """Room for four blocks."""
    return NodeCache(tmp_path / "cache", 4 * SIZE)


def test_a_block_is_fetched_once_and_any_part_of_it_read(cache: NodeCache) -> None:
    origin = Origin()
    with cache.lease(JOB, SIZE) as lease:
        blocks = get(lease, origin, [3, 1, 3], until=5) + get(lease, origin, [1, 3], until=5)
        assert origin.calls == [[key(3), key(1)]]
        assert [block.size for block in blocks] == [SIZE] * 5
        assert [block.read(10, 20) for block in blocks] == [content(key(n))[10:20] for n in (3, 1, 3, 1, 3)]
        assert blocks[0].read(SIZE - 3, SIZE + 9) == content(key(3))[-3:]
        assert (lease.stats.misses, lease.stats.hits, lease.stats.fetched_bytes) == (2, 2, 2 * SIZE)
    assert cache.size_bytes == 2 * SIZE == sum(lying(cache).values())


def test_another_lease_finds_what_lies_there_and_numpy_numbers_are_numbers(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as first, NodeCache(cache.folder, cache.limit_bytes).lease("another", 0) as second:
        get(first, Origin(), [0], until=1)
        block = second.get([(key(0)[0], np.int64(0))], np.array([4]), Origin())[0]
        assert block.read(0, SIZE) == content(key(0))
        assert (second.stats.hits, second.stats.misses) == (1, 0)


def test_what_is_there_is_told_at_once_kept_until_its_step_and_never_fetched(cache: NodeCache) -> None:
    with cache.lease("another", 0) as other:
        get(other, Origin(), [0, 1], until=1)
    with cache.lease(JOB, 2 * SIZE) as lease, cache.lease("a third", 0) as third:
        found = lease.there({key(0): 5, (key(1)[0], np.int64(key(1)[1])): 5, key(2): 5})
        assert {name: block.read(0, SIZE) for name, block in found.items()} == {key(n): content(key(n)) for n in (0, 1)}
        assert (lease.stats.hits, lease.stats.misses) == (2, 0)
        get(third, Origin(), [3, 4], until=1)
        third.advance(2)
        get(third, Origin(), [5, 6], until=2)
        assert set(lying(cache)) == {key(0), key(1), key(5), key(6)}, "what was found is needed until its step"
        third.advance(3)
        lease.advance(6)
        get(third, Origin(), range(7, 11), until=3)
        assert not {key(0), key(1)} & set(lying(cache))


def test_buffers_of_any_kind_are_stored(cache: NodeCache) -> None:
    data = [memoryview(np.arange(6, dtype=np.int16)), bytearray(b"abc"), b""]
    with cache.lease(JOB, 0) as lease:
        blocks = get(lease, lambda _: data, [0, 1, 2], until=0)  # type: ignore[arg-type,return-value]
        assert [block.read(0, 99) for block in blocks] == [bytes(part) for part in data]


def test_threads_and_leases_that_ask_at_once_fetch_each_block_once(tmp_path: Path) -> None:
    origin, numbers = Origin(), range(40)
    leases = [NodeCache(tmp_path / "cache", 10**6).lease(JOB, 0) for _ in range(2)]

    def walk(seed: int) -> bool:
        order = random.Random(seed).sample(numbers, len(numbers))
        parts = [order[start : start + 3] for start in range(0, len(order), 3)]
        read = [
            (n, block.read(0, SIZE))
            for part in parts
            for n, block in zip(part, get(leases[seed % 2], origin, part, 9), strict=True)
        ]
        return all(data == content(key(n)) for n, data in read)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(walk, range(6)))
    assert set(origin.counts.values()) == {1}
    assert len(origin.counts) == 40
    stats = [lease.stats for lease in leases]
    assert sum(s.misses for s in stats) == 40
    assert sum(s.hits + s.waited for s in stats) == 5 * 40


def test_a_hit_waits_for_nobody(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as lease:
        get(lease, Origin(), [0], until=5)
        with cache._files.locked(), ThreadPoolExecutor(1) as pool:
            again = pool.submit(get, lease, Origin(), [0], 5)
            assert again.result(timeout=20)[0].read(0, SIZE) == content(key(0))
            pool.submit(lease.advance, 3).result(timeout=20)


def test_what_fetch_raises_is_raised_and_nothing_of_it_is_kept(cache: NodeCache) -> None:
    def broken(keys: Sequence[BlockKey]) -> list[bytes]:
        raise OSError("the store is gone")

    origin = Origin()
    with cache.lease(JOB, 0) as lease:
        for wrong in (broken, lambda keys: [b"one too few"]):
            with pytest.raises((OSError, ValueError)):
                get(lease, wrong, [0, 1], until=5)
            assert lying(cache) == {}
            assert cache.size_bytes == 0
            assert list((cache.folder / "unfinished").iterdir()) == []
        get(lease, origin, [0, 1], until=5)
        assert origin.calls == [[key(0), key(1)]]


def test_who_waits_for_a_fetch_that_fails_fetches(cache: NodeCache) -> None:
    begun, fail = threading.Event(), threading.Event()

    def failing(keys: Sequence[BlockKey]) -> list[bytes]:
        begun.set()
        assert fail.wait(20)
        raise KeyError("failed")

    origin = Origin()
    with cache.lease(JOB, 0) as lease, ThreadPoolExecutor(2) as pool:
        first = pool.submit(get, lease, failing, [0], 5)
        assert begun.wait(20)
        second = pool.submit(get, lease, origin, [0, 1], 5)
        fail.set()
        assert [block.read(0, SIZE) for block in second.result(20)] == [content(key(0)), content(key(1))]
        with pytest.raises(KeyError):
            first.result(20)
    assert origin.counts == {key(0): 1, key(1): 1}


def test_callers_that_wait_for_each_other_both_come_to_an_end(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", 10 * SIZE)
    both = threading.Barrier(2, timeout=20)

    def slow(keys: Sequence[BlockKey]) -> list[bytes]:
        both.wait()
        return Origin()(keys)

    with cache.lease(JOB, 0) as lease, ThreadPoolExecutor(2) as pool:
        pool.submit(get, lease, Origin(), [0], 5).result(20)
        first, second = pool.submit(get, lease, slow, [1, 0], 5), pool.submit(get, lease, slow, [2, 0], 5)
        assert len(first.result(20)) == len(second.result(20)) == 2
        crossed = [pool.submit(get, lease, Origin(), order, 5) for order in ([3, 4, 5], [5, 4, 3])]
        assert [[block.read(0, SIZE) for block in future.result(20)] for future in crossed] == [
            [content(key(n)) for n in order] for order in ([3, 4, 5], [5, 4, 3])
        ]


def test_a_block_stays_readable_when_it_is_evicted_or_the_lease_ends(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as lease:
        (old,) = get(lease, Origin(), [0], until=0)
        lease.advance(1)
        get(lease, Origin(), [1, 2, 3, 4], until=1)
        assert key(0) not in lying(cache)
    shutil.rmtree(cache.folder)
    assert old.read(0, SIZE) == content(key(0))


def open_files(cache: NodeCache) -> int:
    targets = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return sum(target.startswith(str(cache.folder / "blocks")) for target in targets)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_open_files_are_bounded_and_closed_when_no_longer_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache_lease, "OPEN_BLOCKS", 16)
    cache, origin = NodeCache(tmp_path / "cache", 10**6), Origin()
    with cache.lease(JOB, 0) as lease:
        for start in range(0, 60, 5):
            get(lease, origin, range(start, start + 5), until=start)
        assert open_files(cache) == 16
        assert [get(lease, origin, [n], until=n - n % 5)[0].read(0, 4) for n in range(60)] == [
            content(key(n))[:4] for n in range(60)
        ]
        assert open_files(cache) == 16
        assert len(origin.calls) == 12
        # What has been evicted must not keep its room on the disk.
        lease.advance(51)
        assert open_files(cache) == 5
    assert open_files(cache) == 0


def test_a_closed_lease_and_a_wrong_name_are_refused(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as lease:
        for wrong in (("../../etc/passwd", 0), ("a" * 63, 0), ("a" * 64, -1)):
            with pytest.raises(ValueError, match="64 hex digits"):
                lease.get([wrong], [1], Origin())
        assert list((cache.folder / "unfinished").iterdir()) == []
    lease.close()
    with pytest.raises(ValueError, match="closed"):
        get(lease, Origin(), [0], until=1)
    with pytest.raises(ValueError, match="closed"):
        lease.advance(1)
