"""What a loader counts is what it did itself, wherever the shards lie."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from remote_folder import as_remote
from sharded import order_of, sharded_release
from small_runs import silent, small_job, small_release

from draf_dist.data.loader import Loader, Reading, SplitLoader
from draf_dist.data.loader_stats import LoaderStats
from draf_dist.data.node_cache import NodeCache
from draf_dist.data.release import Release, index_path
from draf_dist.data.shards import ABSENT, OFFSET, SIZE
from draf_dist.schema.batch import Batch
from draf_dist.schema.release import Split
from draf_dist.training.run import train
from draf_dist.training.run_folder import open_run
from draf_dist.training.summary import summarise


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return sharded_release(tmp_path_factory.mktemp("release"))


def one_epoch(loader: Loader) -> Iterator[tuple[int, Batch]]:
    return loader.batches(0, order_of(loader.releases[0]).steps_per_epoch)


def file_bytes(release: Release, split: Split) -> int:
    """Of all members and indexes of a split."""
    tables = [release.index(shard).members.astype(np.int64) for shard in release.shards(split)]
    members = sum(int(np.where(table[..., OFFSET] != ABSENT, table[..., SIZE], 0).sum()) for table in tables)
    return members + sum(Path(release.url, index_path(shard)).stat().st_size for shard in release.shards(split))


def test_of_local_shards_the_bytes_of_members_and_indexes_are_counted(release: Release) -> None:
    loader = Loader(release, "train", order_of(release), threads=3)
    assert sum(1 for _ in one_epoch(loader))
    assert loader.stats().read_bytes == file_bytes(release, "train")
    validation = SplitLoader(release, "val", 8)
    assert sum(1 for _ in validation.batches())
    once = validation.stats()
    assert once.read_bytes == file_bytes(release, "val")
    assert once.hit_rate is None
    assert sum(1 for _ in validation.batches())
    assert validation.stats().members == 2 * once.members
    # The indexes are kept.
    assert once.read_bytes < validation.stats().read_bytes < 2 * once.read_bytes


def test_training_does_not_count_what_validation_reads_from_the_same_store(release: Release, tmp_path: Path) -> None:
    remote, _ = as_remote(release)
    reading = Reading(cache=NodeCache(tmp_path / "cache", 10**9))
    training, validation = (
        Loader(remote, "train", order_of(remote), reading=reading),
        SplitLoader(remote, "val", 8, reading=reading),
    )
    assert sum(1 for _ in one_epoch(training))
    before = training.stats()
    assert before.read_bytes > 0
    assert validation.stats() == LoaderStats()
    assert sum(1 for _ in validation.batches())
    assert training.stats() == before
    found = validation.stats()
    assert found.requests > 0
    assert found.cache_misses > 0
    assert 0 < found.read_bytes < before.read_bytes


def test_a_local_run_says_how_much_it_read_for_training_and_for_validation(tmp_path: Path) -> None:
    job = small_job(small_release(tmp_path, num_subjects=40, seed=1), epochs=2)
    train(job, str(tmp_path / "run"), console=silent())
    lines = [line for line in open_run(str(tmp_path / "run")).metrics() if line["event"] == "step"]
    read = [line["data"]["read_bytes"] for line in lines]
    assert read == sorted(read)
    assert read[0] > 0
    assert all(line["data"]["retries"] == 0 for line in lines)
    summary = summarise(str(tmp_path / "run"))
    assert summary.data.read_bytes >= read[-1]
    assert 0 < summary.validation.read_bytes < summary.data.read_bytes
