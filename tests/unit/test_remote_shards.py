"""Shards that are read by ranges: the same batches, every block fetched once an epoch, nothing held that no step needs."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from batches import same
from remote_folder import as_remote
from sharded import copied, order_of, sharded_release, tar_of, uids

from draf_dist.data.loader import Loader, Portion, Reading, SplitLoader
from draf_dist.data.mixture import Mixture
from draf_dist.data.node_cache import NodeCache
from draf_dist.data.order import Order
from draf_dist.data.pipeline import reach
from draf_dist.data.receipts import receipt
from draf_dist.data.release import Release
from draf_dist.data.working_set import working_set
from draf_dist.errors import DataError, SpecError


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return sharded_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    return Reading(cache=NodeCache(tmp_path / "cache", 10**9))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    for module in ("remote_shards", "loader"):
        monkeypatch.setattr(f"draf_dist.data.{module}.BLOCK_BYTES", 2000)
    return 2000


@pytest.mark.parametrize("block_bytes", [300, 4096, 2**20])
def test_blocks_give_what_maps_give(release: Release, reading: Reading, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    for module in ("remote_shards", "loader"):
        monkeypatch.setattr(f"draf_dist.data.{module}.BLOCK_BYTES", block_bytes)
    remote, _ = as_remote(release)
    order = order_of(release)
    pairs = zip(
        Loader(release, "train", order).batches(3, 2 * order.steps_per_epoch),
        Loader(remote, "train", order, threads=3, reading=reading).batches(3, 2 * order.steps_per_epoch),
        strict=True,
    )
    assert all(same(one, other) for (_, one), (_, other) in pairs)


def test_every_block_is_fetched_once_an_epoch_by_all_ranks_together(release: Release, reading: Reading, small_blocks: int) -> None:
    remote, store = as_remote(release)
    order = order_of(release)
    for rank in range(3):
        loader = Loader(remote, "train", order, rank=rank, world=3, reading=reading)
        list(loader.batches(0, order.steps_per_epoch))
    tars = Counter(block for path, start, stop in store.asked for block in blocks_of(path, start, stop, small_blocks))
    assert set(tars.values()) == {1}
    assert store.num_bytes <= sum(shard.size_bytes for shard in release.shards("train"))


def blocks_of(path: str, start: int, stop: int, size: int) -> list[tuple[str, int]]:
    return [(path, block) for block in range(start // size, -(-stop // size))]


def small_windows(release: Release) -> Order:
    """An order that has few samples open at once."""
    sizes = tuple(shard.num_samples for shard in release.shards("train"))
    return Order(sizes, release.version, 3, batch_size=4, groups=2, open_samples=8)


def test_a_cache_of_the_working_set_is_enough_for_epoch_after_epoch(
    release: Release, tmp_path: Path, small_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draf_dist.data.pipeline.AHEAD_STEPS", 2)
    order = small_windows(release)
    shard_bytes = [[shard.size_bytes for shard in release.shards("train")]]
    needed = working_set(order, shard_bytes, block_bytes=small_blocks, ahead_steps=reach(0))
    assert needed < sum(shard_bytes[0])
    cache = NodeCache(tmp_path / "cache", needed)
    remote, store = as_remote(release)
    loader = Loader(remote, "train", order, reading=Reading(prefetch=0, cache=cache))
    batches = [batch for _, batch in loader.batches(0, 3 * order.steps_per_epoch)]
    assert receipt(np.array(uids(batches[: order.steps_per_epoch]))) == release.manifest.receipts["train"]
    assert store.num_bytes <= 3 * sum(shard_bytes[0])
    assert cache.size_bytes <= needed
    stats = loader.stats()
    assert stats.read_bytes >= store.num_bytes
    assert stats.cache_misses >= store.num_bytes / small_blocks
    assert stats.hit_rate is not None


def test_a_cache_below_the_working_set_is_refused_before_anything_is_read(release: Release, tmp_path: Path) -> None:
    remote, store = as_remote(release)
    loader = Loader(remote, "train", order_of(release), reading=Reading(cache=NodeCache(tmp_path / "cache", 1000)))
    with pytest.raises(SpecError, match="DRAF_CACHE_BYTES"):
        next(loader.batches())
    assert store.asked == []


def test_neighbouring_blocks_come_in_one_request(
    release: Release, reading: Reading, small_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draf_dist.data.remote_shards.BLOCKS_PER_REQUEST", 4)
    remote, store = as_remote(release)
    order = order_of(release)
    list(Loader(remote, "train", order, reading=reading).batches(0, order.steps_per_epoch))
    lengths = [stop - start for _, start, stop in store.asked]
    assert max(lengths) == 4 * small_blocks
    assert len(lengths) < sum(-(-shard.size_bytes // small_blocks) for shard in release.shards("train")) / 2


def test_evaluation_reads_every_byte_once_whatever_is_swapped(release: Release, small_blocks: int, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("DRAF_CACHE_DIR", str(tmp_path / "cache"))
    remote, store = as_remote(release)
    partners = {"cxr": np.arange(sum(shard.num_samples for shard in release.shards("train")))[::-1].copy()}
    passes = [SplitLoader(each, "train", 8).studies(Portion(partners=partners)) for each in (release, remote)]
    pairs = zip(*passes, strict=True)
    assert all(same(one, other) for one, other in pairs)
    assert store.num_bytes <= sum(shard.size_bytes for shard in release.shards("train"))


def test_a_portion_of_a_split_is_some_of_its_batches_and_reads_little_else(
    release: Release, small_blocks: int, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("DRAF_CACHE_DIR", str(tmp_path / "cache"))
    whole = list(SplitLoader(release, "train", 8).studies())
    remote, store = as_remote(release)
    loader = SplitLoader(remote, "train", 8)
    assert loader.num_batches == len(whole) > 4
    assert all(map(same, loader.studies(Portion(range(2, 4))), whole[2:4]))
    # Blocks at both ends belong to neighbours too.
    share = 2 / len(whole)
    assert store.num_bytes < share * sum(shard.size_bytes for shard in release.shards("train")) + 4 * small_blocks
    chosen = np.arange(loader.num_samples) % 8 == 3
    assert all(same(one, batch.rows(3, 4)) for one, batch in zip(loader.studies(Portion(chosen=chosen)), whole, strict=False))


def test_a_mixture_of_a_folder_and_a_bucket_is_that_of_two_folders(release: Release, reading: Reading) -> None:
    remote, _ = as_remote(release)
    plan = Mixture((order_of(release), order_of(release, seed=9)), (2, 1), 16)
    one, other = (Loader([release, second], "train", plan, reading=reading).batches(0, 20) for second in (release, remote))
    assert all(same(first, second) for (_, first), (_, second) in zip(one, other, strict=True))


# What goes wrong on the way.


@pytest.fixture
def copy(release: Release, tmp_path: Path) -> Release:
    return copied(release, tmp_path / "copy")


def test_a_block_that_went_bad_in_the_cache_is_fetched_again(release: Release, reading: Reading, tmp_path: Path) -> None:
    remote, store = as_remote(release)
    order = order_of(release)
    expected = [batch for _, batch in Loader(remote, "train", order, reading=reading).batches(0, order.steps_per_epoch)]
    blocks = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 10_000]
    damaged = 0
    for path in blocks:
        content = bytearray(path.read_bytes())
        if content[:16] == b"SQLite format 3\x00":
            continue
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
        damaged += 1
    assert damaged > 2
    found = [batch for _, batch in Loader(remote, "train", order, reading=reading).batches(0, order.steps_per_epoch)]
    assert all(same(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize(("kept", "found"), [(3000, "an end (after 3000|before)"), (None, "nothing")])
def test_a_shard_that_is_cut_short_or_gone_is_named(copy: Release, reading: Reading, kept: int | None, found: str) -> None:
    path = tar_of(copy)
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[:kept])
    remote, _ = as_remote(copy)
    with pytest.raises(DataError, match=found) as caught:
        list(Loader(remote, "train", order_of(copy), reading=reading).batches(0, 30))
    assert copy.shards("train")[0].sha256 in str(caught.value)
