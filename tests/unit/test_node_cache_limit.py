"""The limit of the node cache: what goes when room is needed, what stays, and who is refused."""

import os
import random
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from cached_blocks import JOB, SIZE, Origin, content, get, key, lying
from small_disk import small_disk

from draf_dist.data.node_cache import BlockKey, NodeCache
from draf_dist.errors import SpecError, StorageFullError


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    """Room for four blocks."""
    return NodeCache(tmp_path / "cache", 4 * SIZE)


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
