"""The node cache within one process: what is fetched, what is kept, what goes, what is refused."""

import hashlib
import os
import random
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from small_disk import small_disk

from draf_dist.data import node_cache_lease
from draf_dist.data.node_cache import Block, BlockKey, Lease, NodeCache, default_cache
from draf_dist.errors import SpecError, StorageFullError

SIZE = 1000
JOB = "plan-of-release-a"


def key(number: int) -> BlockKey:
    """The blocks of two shards in turn."""
    return f"{number % 2:064x}", number // 2


def content(block: BlockKey, size: int = SIZE) -> bytes:
    """What belongs into a block; no two blocks are alike."""
    return (hashlib.sha256(f"{block}".encode()).digest() * (size // 32 + 1))[:size]


class Origin:
    """Where blocks come from; remembers what was asked of it."""

    def __init__(self, sizes: dict[BlockKey, int] | None = None) -> None:
        self.sizes, self.calls = sizes or {}, list[list[BlockKey]]()

    def __call__(self, keys: Sequence[BlockKey]) -> list[bytes]:
        self.calls.append(list(keys))
        return [content(block, self.sizes.get(block, SIZE)) for block in keys]

    @property
    def counts(self) -> Counter[BlockKey]:
        return Counter(block for call in self.calls for block in call)


def lying(cache: NodeCache) -> dict[BlockKey, int]:
    """What lies on the disk, whatever the index says."""
    files = (path for path in (cache.folder / "blocks").rglob("*") if path.is_file())
    return {(path.name[:64], int(path.name[65:])): path.stat().st_size for path in files}


def get(lease: Lease, origin: Callable[[Sequence[BlockKey]], Sequence[bytes]], numbers: Sequence[int], until: int) -> list[Block]:
    return lease.get([key(number) for number in numbers], [until] * len(numbers), origin)


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


def test_what_is_not_needed_any_more_goes_first_and_the_oldest_of_it(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as lease:
        for number, until in ((0, 7), (1, 3), (2, 5), (3, 90)):
            get(lease, Origin(), [number], until)
        lease.advance(8)
        get(lease, Origin(), [4], until=90)
        assert set(lying(cache)) == {key(n) for n in (0, 2, 3, 4)}
        get(lease, Origin(), [5, 6], until=90)
        assert set(lying(cache)) == {key(n) for n in (3, 4, 5, 6)}
        assert (lease.stats.evicted, lease.stats.evicted_bytes, lease.stats.over_limit_bytes) == (3, 3 * SIZE, 0)


def test_nothing_goes_before_room_is_needed(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as lease:
        get(lease, Origin(), [0, 1, 2], until=1)
        lease.advance(1000)
        get(lease, Origin(), [3], until=1001)
        assert len(lying(cache)) == 4
    assert len(lying(cache)) == 4


def test_a_block_is_needed_until_the_slowest_process_of_its_job_is_past_it(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as fast, cache.lease(JOB, 0) as slow:
        get(fast, Origin(), [0, 1, 2, 3], until=5)
        fast.advance(6)
        slow.advance(5)
        with pytest.warns(RuntimeWarning, match="need more than they said"):
            get(fast, Origin(), [4], until=20)
        slow.advance(6)
        get(fast, Origin(), [5], until=20)
        assert {key(4), key(5)} < set(lying(cache))
        assert len(lying(cache)) == 4


def test_the_largest_until_counts_whoever_said_it(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as first, cache.lease(JOB, 0) as second:
        get(first, Origin(), [0, 1, 2, 3], until=5)
        get(second, Origin(), [1], until=9)
        get(first, Origin(), [2], until=9)
        for lease in (first, second):
            get(lease, Origin(), [2], until=4)
        for lease in (first, second):
            lease.advance(8)
        get(first, Origin(), [4, 5], until=20)
        assert set(lying(cache)) == {key(n) for n in (1, 2, 4, 5)}


def test_a_block_that_two_jobs_need_stays_until_both_are_past_it(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as lease, cache.lease("another", 0) as other:
        get(other, Origin(), [0], until=50)
        get(lease, Origin(), [0, 1, 2, 3], until=5)
        with cache.lease("another", 0) as third:
            get(third, Origin(), [0], until=3)
        other.advance(50)
        lease.advance(900)
        get(lease, Origin(), [4, 5, 6], until=1000)
        assert set(lying(cache)) == {key(n) for n in (0, 4, 5, 6)}
        other.advance(51)
        get(lease, Origin(), [7], until=1000)
        assert set(lying(cache)) == {key(n) for n in (4, 5, 6, 7)}


def test_what_a_finished_job_left_goes_before_what_a_live_one_is_past(cache: NodeCache) -> None:
    with cache.lease("finished", 0) as finished:
        get(finished, Origin(), [0, 1], until=10**6)
    with cache.lease(JOB, 0) as lease:
        get(lease, Origin(), [2, 3], until=5)
        lease.advance(6)
        get(lease, Origin(), [4, 5], until=9)
        assert set(lying(cache)) == {key(n) for n in (2, 3, 4, 5)}


def test_a_new_attempt_at_an_earlier_step_uses_what_lies_there_and_holds_none_of_it(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as lease:
        get(lease, Origin(), [0, 1, 2, 3], until=500)
    origin = Origin()
    with cache.lease(JOB, 4 * SIZE) as lease:
        lease.advance(10)
        get(lease, origin, [1], until=20)
        get(lease, origin, [4, 5, 6], until=20)
        assert origin.counts == {key(n): 1 for n in (4, 5, 6)}
        assert set(lying(cache)) == {key(n) for n in (1, 4, 5, 6)}
        assert lease.stats.over_limit_bytes == 0


def test_a_smaller_limit_holds_from_the_next_lease_on(cache: NodeCache) -> None:
    with cache.lease(JOB, 0) as lease:
        get(lease, Origin(), [0, 1, 2, 3], until=5)
    with NodeCache(cache.folder, 2 * SIZE).lease(JOB, 0):
        assert len(lying(cache)) == 2
        assert cache.size_bytes == 2 * SIZE


class Walk:
    """A random order, and ranks that walk it at most `ahead` steps apart: rank r reads its part of every step."""

    def __init__(self, seed: int) -> None:
        self.random = chance = random.Random(seed)
        self.num_steps, self.ahead, self.num_ranks = chance.randint(5, 30), chance.randint(0, 4), chance.randint(1, 4)
        self.steps: list[list[int]] = [[] for _ in range(self.num_steps)]
        for number in range(chance.randint(3, 40)):
            first, length = chance.randrange(self.num_steps), chance.randint(1, 6)
            for step in {first, *(chance.randint(first, first + length) for _ in range(length))}:
                if step < self.num_steps:
                    self.steps[step].append(number)
        asked = [(number, step) for step, numbers in enumerate(self.steps) for number in numbers]
        self.first = dict(reversed(asked))
        self.last = dict(asked)
        self.sizes = {key(number): chance.randint(0, 2000) for number in self.first}

    @property
    def working_set(self) -> int:
        """The most bytes that are open at once."""
        spans = [(first, self.last[number], self.sizes[key(number)]) for number, first in self.first.items()]
        return max(sum(size for first, last, size in spans if first <= t + self.ahead and last >= t) for t in range(self.num_steps))

    def moves(self) -> list[tuple[int, int]]:
        """(rank, step), in an order that keeps the ranks together."""
        at, moves = [0] * self.num_ranks, []
        while min(at) < self.num_steps:
            may = [rank for rank, step in enumerate(at) if step < self.num_steps and step <= min(at) + self.ahead]
            rank = self.random.choice(may)
            moves.append((rank, at[rank]))
            at[rank] += 1
        return moves


@pytest.mark.parametrize("seed", range(20))
def test_with_room_for_the_working_set_every_byte_is_fetched_once(tmp_path: Path, seed: int) -> None:
    walk = Walk(seed)
    limit = walk.working_set
    caches = [NodeCache(tmp_path / "cache", limit) for _ in range(walk.num_ranks)]
    leases = [cache.lease(JOB, limit) for cache in caches]
    origin = Origin(walk.sizes)
    for rank, step in walk.moves():
        mine = [number for i, number in enumerate(walk.steps[step]) if i % walk.num_ranks == rank]
        blocks = leases[rank].get([key(n) for n in mine], [walk.last[n] for n in mine], origin)
        assert [block.read(0, block.size) for block in blocks] == [content(key(n), walk.sizes[key(n)]) for n in mine]
        leases[rank].advance(step + 1)
        assert caches[0].size_bytes == sum(lying(caches[0]).values()) <= limit
    assert origin.counts == dict.fromkeys(walk.sizes, 1)
    assert all(lease.stats.over_limit_bytes == 0 for lease in leases)


def test_the_limit_holds_while_blocks_are_written(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", 10 * 2**20)
    stop, most = threading.Event(), [0]

    def watch() -> None:
        while not stop.is_set():
            with suppress(FileNotFoundError):  # evicted meanwhile
                most[0] = max(most[0], sum(lying(cache).values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with cache.lease(JOB, 0) as lease:
        for step in range(15):
            lease.advance(step)
            get(lease, lambda keys: [bytes(2**21) for _ in keys], [2 * step, 2 * step + 1], until=step)
    stop.set()
    watcher.join()
    assert 0 < most[0] <= cache.limit_bytes


def test_a_limit_below_what_a_job_needs_is_refused_with_numbers_and_remedy(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", 20 * 10**9)
    with pytest.raises(SpecError) as caught:
        cache.lease(JOB, 30 * 10**9)
    assert str(caught.value) == (
        f"{tmp_path}/cache: expected room for 30.0 GB of blocks, found a limit of 20.0 GB (this job needs 30.0 GB). "
        "Set DRAF_CACHE_BYTES=30000000000 or more, or make open_samples or groups of the job smaller."
    )
    cache.lease(JOB, 20 * 10**9).close()


def test_jobs_add_up_and_processes_of_one_job_do_not(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", 100)
    with cache.lease("first", 60), cache.lease("first", 60), cache.lease("second", 40):
        with pytest.raises(
            SpecError, match=r"room for 101 bytes .*\(this job needs 1 bytes, job first 60 bytes, job second 40 bytes\)"
        ):
            cache.lease("third", 1)
        with pytest.raises(SpecError, match="DRAF_CACHE_BYTES=110 or more.*, or wait until the other jobs on this node have ended"):
            cache.lease("second", 50)
    cache.lease("third", 100).close()


def test_a_job_that_needs_more_than_it_said_goes_on_above_the_limit_and_says_so(cache: NodeCache) -> None:
    with cache.lease(JOB, 4 * SIZE) as lease:
        get(lease, Origin(), [0, 1, 2, 3], until=5)
        with pytest.warns(RuntimeWarning, match="exceeds its limit"):
            assert len(get(lease, Origin(), [4, 5], until=6)) == 2
        assert lease.stats.over_limit_bytes == 2 * SIZE
        assert cache.size_bytes == 6 * SIZE
        lease.advance(6)
        get(lease, Origin(), [6], until=7)
        assert cache.size_bytes <= 4 * SIZE


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


def fill(file: Path) -> None:
    """Takes all the room that is left."""
    with suppress(OSError), file.open("wb", buffering=0) as other:
        while other.write(bytes(4096)):
            pass


def test_a_full_disk_takes_what_may_go_and_then_says_that_it_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4) as disk:
        crowd(disk)


def crowd(disk: Path) -> None:
    blob = os.urandom(2**20)
    cache = NodeCache(disk / "cache", 100 * 2**20)

    def fetch(keys: Sequence[BlockKey]) -> list[bytes]:
        return [blob for _ in keys]

    with cache.lease(JOB, 0) as lease:
        get(lease, fetch, [0, 1, 2], until=5)
        with pytest.raises(StorageFullError, match=r"disk/cache: expected room on the disk, found .* MiB free"):
            get(lease, fetch, [3], until=6)
        assert set(lying(cache)) == {key(0), key(1), key(2)}
        lease.advance(6)
        assert get(lease, fetch, [3], until=6)[0].read(0, 2**20) == blob
        assert lease.stats.evicted >= 1
        assert get(lease, fetch, [4, 5], until=7)[1].read(0, 2**20) == blob
        # The disk is full to the last byte, through no fault of ours: not even the index can be written.
        fill(disk / "of others")
        with pytest.raises(StorageFullError):
            get(lease, fetch, range(10, 60), until=8)
        lease.advance(9)
        assert get(lease, fetch, [6], until=9)[0].read(0, 2**20) == blob
        assert cache.size_bytes == sum(lying(cache).values())
    assert list((cache.folder / "unfinished").iterdir()) == []


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
