"""Who counts as one job to the node cache: processes and passes of a run do, two runs of the same plan don't."""

import sqlite3
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from cached_blocks import JOB, SIZE, Origin, get, key, lying
from memory_source import KEY, MemorySource
from remote_folder import as_remote

from draf_dist.data import loader as loader_module
from draf_dist.data import pipeline, remote_shards
from draf_dist.data.loader import Loader, Reading
from draf_dist.data.node_cache import NodeCache
from draf_dist.data.order import Order
from draf_dist.data.pipeline import reach
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release
from draf_dist.data.working_set import working_set
from draf_dist.errors import SpecError

BLOCK = 2000


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are small against the shards, and a short way ahead."""
    for module in (loader_module, remote_shards):
        monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(pipeline, "AHEAD_STEPS", 2)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("jobs")
    made = prepare(MemorySource(num_studies=600), str(folder), subject_key=KEY, shard_size_bytes=20_000)
    return as_remote(made)[0]


@pytest.fixture
def order(release: Release) -> Order:
    return Order(tuple(shard.num_samples for shard in release.shards("train")), release.version, 3, 4, 2, 8)


def needed(release: Release, order: Order) -> int:
    sizes = [[shard.size_bytes for shard in release.shards("train")]]
    return working_set(order, sizes, block_bytes=BLOCK, ahead_steps=reach(1))


def loader(release: Release, order: Order, cache: Path, limit: int, **reading: object) -> Loader:
    return Loader(release, "train", order, reading=Reading(prefetch=1, cache=NodeCache(cache, limit), **reading))


@pytest.mark.parametrize("names", [("first", "second"), (None, None)])
def test_a_run_is_not_held_up_by_another_of_the_same_plan(
    release: Release, order: Order, tmp_path: Path, names: tuple[str | None, str | None]
) -> None:
    most, limit = 0, 2 * needed(release, order)
    assert limit < sum(shard.size_bytes for shard in release.shards("train"))
    slow = loader(release, order, tmp_path / "cache", limit, job=names[0]).batches(0, order.steps_per_epoch)
    with closing(slow), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # that the limit is exceeded
        next(slow)
        fast = loader(release, order, tmp_path / "cache", limit, job=names[1])
        for _ in fast.batches(0, order.steps_per_epoch):
            most = max(most, NodeCache(tmp_path / "cache", limit).size_bytes)
    assert limit / 2 < most <= limit


def test_two_runs_of_one_plan_need_twice_as_much_and_two_ranks_of_one_run_do_not(
    release: Release, order: Order, tmp_path: Path
) -> None:
    limit = needed(release, order)
    with closing(loader(release, order, tmp_path / "cache", limit, job="s3://bucket/run-1").batches()) as first:
        next(first)
        with closing(loader(release, order, tmp_path / "cache", limit, job="s3://bucket/run-1").batches()) as second:
            next(second)
        with (
            closing(loader(release, order, tmp_path / "cache", limit, job="s3://bucket/run-2").batches()) as third,
            pytest.raises(SpecError, match=rf"job s3://bucket/run-1 .*DRAF_CACHE_BYTES={2 * limit} or more"),
        ):
            next(third)


def test_passes_of_one_job_share_its_room_and_count_their_own_steps(tmp_path: Path) -> None:
    cache, origin = NodeCache(tmp_path / "cache", 4 * SIZE), Origin()
    with cache.lease(JOB, 4 * SIZE, "training") as training:
        get(training, origin, [0, 1], until=500)
        training.advance(500)
        with cache.lease(JOB, 2 * SIZE, "validation") as validation:
            validation.advance(0)
            get(validation, origin, [2], until=1)
            get(validation, origin, [3], until=0)
            validation.advance(1)
            # Step 500 of training says nothing of step 1 of validation, and the other way round.
            get(training, origin, [4], until=501)
            assert set(lying(cache)) == {key(n) for n in (0, 1, 2, 4)}
        with pytest.raises(SpecError, match="this job needs"):
            cache.lease("another", SIZE)


def test_what_ended_jobs_needed_is_forgotten_when_the_next_one_begins(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", 10 * SIZE)
    with cache.lease("long", 0) as long:
        get(long, Origin(), [9], until=9)
        for number in range(20):
            with cache.lease(f"pass {number}", 0) as lease:
                get(lease, Origin(), [0, 1, 2], until=5)
        with closing(sqlite3.connect(cache.folder / "index.sqlite")) as index:
            needs, jobs = (index.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("need", "job"))
        # Those of the last pass and of the one that lives; nobody, the two of them, and the pass before, at most.
        assert needs == 4
        assert jobs <= 4


def test_the_same_reading_without_a_name_is_another_job_each_time(release: Release, order: Order, tmp_path: Path) -> None:
    made = loader(release, order, tmp_path / "cache", needed(release, order))
    with closing(made.batches()) as first:
        next(first)
        with closing(replace_cache(made).batches()) as second, pytest.raises(SpecError, match="job process"):
            next(second)


def replace_cache(made: Loader) -> Loader:
    """Another loader of the same release, plan and cache."""
    reading = made._reading
    return Loader(made.releases, "train", made.plan, reading=replace(reading, cache=reading.cache))
