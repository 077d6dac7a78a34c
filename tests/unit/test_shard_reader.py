"""Blocks of a remote store and their cache: each fetched once, asked for together, bounded, shared by threads."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from batches import same
from sharded import order_of, sharded_release

from draf_dist.data.cache import SharedCache
from draf_dist.data.loader import Loader
from draf_dist.data.release import Release
from draf_dist.data.shard_reader import Place, ShardReader, make_block_cache
from draf_dist.data.shards import Member
from draf_dist.errors import DataError
from draf_dist.storage import LocalStore


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return sharded_release(tmp_path_factory.mktemp("release"))


# Blocks, as of a remote store.


class WithoutMaps(LocalStore):
    """A folder that is read by ranges, as a remote store is; counts what is asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requested_bytes = 0

    def local_path(self, path: str) -> Path | None:
        return None

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        self.requested_bytes += stop - start
        return super().read_range(path, start, stop)


@pytest.mark.parametrize("block_bytes", [300, 4096, 2**20])
def test_blocks_give_what_maps_give(release: Release, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr("draf_dist.data.shard_reader.BLOCK_BYTES", block_bytes)
    remote = replace(release, store=WithoutMaps(Path(release.url)))
    order = order_of(release)
    pairs = zip(
        Loader(release, "train", order).batches(0, order.steps_per_epoch),
        Loader(remote, "train", order, threads=3).batches(0, order.steps_per_epoch),
        strict=True,
    )
    assert all(same(one, other) for (_, one), (_, other) in pairs)


def test_a_cache_that_holds_the_open_shards_fetches_every_byte_once_an_epoch(release: Release) -> None:
    store = WithoutMaps(Path(release.url))
    order = order_of(release)
    list(Loader(replace(release, store=store), "train", order).batches(0, order.steps_per_epoch))
    assert store.requested_bytes <= sum(shard.size_bytes for shard in release.shards("train"))


def test_a_cache_that_is_too_small_is_slow_but_right(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draf_dist.data.shard_reader.BLOCK_BYTES", 4096)
    remote = ShardReader(replace(release, store=WithoutMaps(Path(release.url))), "train", blocks := make_block_cache(10_000))
    local = ShardReader(release, "train")
    for sample in range(local.num_samples):
        places = [place for place in local.places(sample) if place is not None]
        assert [bytes(data) for data in remote.read(places)] == [bytes(data) for data in local.read(places)]
        assert blocks.size <= 10_000


def test_neighbouring_blocks_are_asked_for_together(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[tuple[int, int]]] = []

    class Asked(WithoutMaps):
        def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
            asked.append(list(ranges))
            return super().read_ranges(path, ranges)

    monkeypatch.setattr("draf_dist.data.shard_reader.BLOCK_BYTES", 1000)
    monkeypatch.setattr("draf_dist.data.shard_reader.BLOCKS_PER_REQUEST", 4)
    reader = ShardReader(replace(release, store=Asked(Path(release.url))), "train")
    place = reader.places(0)[-1]
    assert place is not None

    def at(offset: int, size: int) -> Place:
        return replace(place, member=Member(offset, size, 0))

    reader.read([at(1500, 700), at(2500, 10), at(7000, 100), at(10_000, 6_500)])
    assert asked == [[(1000, 3000), (7000, 8000), (10_000, 14_000), (14_000, 17_000)]]
    reader.read([at(900, 1200)])
    assert asked[1:] == [[(0, 1000)]]


# The cache of blocks.


def test_the_cache_keeps_what_was_used_last_within_its_limit() -> None:
    made: list[int] = []

    def make(keys: list[int]) -> list[bytes]:
        made.extend(keys)
        return [bytes(10) for _ in keys]

    cache: SharedCache[int, bytes] = SharedCache(30, len)
    for keys in ([1, 2], [2, 3], [1], [4], [2]):
        assert len(cache.get(keys, make)) == len(keys)
        assert cache.size <= 30
    assert made == [1, 2, 3, 4, 2]


@pytest.mark.timeout(30)
def test_threads_that_want_the_same_wait_for_one() -> None:
    made: list[int] = []
    cache: SharedCache[int, int] = SharedCache(100, lambda value: 1)

    def make(keys: list[int]) -> list[int]:
        made.extend(keys)
        time.sleep(0.02)
        return [key * key for key in keys]

    results: list[list[int]] = []
    wanted = ([1, 2, 3], [3, 2, 5], [5, 1, 7], [7, 3, 1])
    threads = [threading.Thread(target=lambda keys=keys: results.append(cache.get(keys, make))) for keys in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(tuple, results)) == sorted(tuple(key * key for key in keys) for keys in wanted)
    assert sorted(made) == [1, 2, 3, 5, 7]


@pytest.mark.timeout(30)
def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    cache: SharedCache[int, int] = SharedCache(100, lambda value: 1)
    begun, failures = threading.Event(), []

    def fail(keys: list[int]) -> list[int]:
        begun.set()
        time.sleep(0.05)
        raise DataError("broken")

    def ask() -> None:
        try:
            cache.get([1], fail)
        except DataError as error:
            failures.append(str(error))

    def threads() -> Iterator[threading.Thread]:
        for _ in range(3):
            thread = threading.Thread(target=ask)
            thread.start()
            begun.wait()
            yield thread

    for thread in list(threads()):
        thread.join()
    assert failures == ["broken"] * 3
    assert cache.get([1], lambda keys: [5]) == [5]
