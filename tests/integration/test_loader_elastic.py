"""A run that stops at two ranks and goes on at any other number: nothing is missed or repeated, no batch and no pixel changes.

Real shards on a real S3 server: our own (PNG) and those of others (JPEG and PNG), with 30 % of the parts missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from reading_ranks import Reader, Seen, read, read_by_all, read_by_processes
from remote_release import foreign_release, own_release, put

from draf_dist.data.release import Release, open_release
from draf_dist.launch.local_s3 import LocalS3

STOP = 20
BLOCK_BYTES = 2**16
MATRIX = [(world, threads) for world in (1, 2, 3, 4) for threads in (1, 2, 4)]


@dataclass(frozen=True)
class Run:
    """One epoch of a release in a bucket. whole: read by one rank; before: the first STOP steps, by two."""

    release: Release
    reader: Reader
    whole: Seen
    before: Seen

    @property
    def steps(self) -> range:
        return range(self.reader.order(self.release).steps_per_epoch)


@pytest.fixture(scope="module", autouse=True)
def server(s3_server: LocalS3) -> Iterator[LocalS3]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        for module in ("remote_shards", "loader"):
            patch.setattr(f"draf_dist.data.{module}.BLOCK_BYTES", BLOCK_BYTES)
        yield s3_server


def begun(release: Release, folder: Path) -> Run:
    reader = Reader(release.url, folder / "whole", batch_size=24, block_bytes=BLOCK_BYTES)
    steps = reader.order(release).steps_per_epoch
    assert steps > STOP + 10
    before = read_by_all(replace(reader, cache=folder / "before", world=2), release, range(STOP))
    return Run(release, reader, read(replace(reader, threads=1), release, range(steps)), before)


@pytest.fixture(scope="module")
def own(server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("own")
    made = own_release(folder / "own", 1000, 20)
    url = f"{server.create_bucket('elastic-own')}/wards"
    put(folder / "own", url)
    run = begun(open_release(url), folder)
    # The bucket changes nothing against the folder.
    assert run.whole.rows == read(run.reader, made, run.steps).rows
    return run


@pytest.fixture(scope="module")
def foreign(server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("foreign")
    return begun(foreign_release(folder / "tars", server.create_bucket("elastic-foreign"), 1200, 20), folder)


def goes_on(run: Run, before: Seen, rest: Seen, world: int) -> None:
    """That what was read before and after the change of ranks is what one rank reads without it."""
    together = Seen()
    together.join(before)
    together.join(rest)
    expected = [uid for shard in run.release.shards("train") for uid in run.release.index(shard).uids.tolist()]
    assert sorted(uid for rows in together.rows.values() for uid, _ in rows) == sorted(expected)
    assert together.receipt(run.steps) == run.whole.receipt(run.steps) == run.release.manifest.receipts["train"]
    # The same samples in every global batch, and of each the same bytes in every tensor.
    assert [together.global_batch(step) for step in run.steps] == [run.whole.global_batch(step) for step in run.steps]
    for step in range(STOP, run.steps.stop):
        assert len(rest.num_rows[step]) == world, "a rank has another number of steps"
        assert rest.num_rows[step] == rest.num_rows[STOP], "a rank's batches change their size"
        assert sum(rest.num_rows[step]) == run.reader.batch_size
        assert max(rest.num_rows[step]) - min(rest.num_rows[step]) <= 1


def missing(release: Release) -> float:
    return 1 - float(np.concatenate([release.index(shard).present for shard in release.shards("train")]).mean())


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("world", "threads"), MATRIX)
def test_any_ranks_and_threads_go_on_where_two_ranks_stopped(own: Run, tmp_path: Path, world: int, threads: int) -> None:
    reader = replace(own.reader, world=world, threads=threads, cache=tmp_path / "cache")
    goes_on(own, own.before, read_by_all(reader, own.release, own.steps[STOP:]), world)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("world", "threads"), [(3, 2), (4, 1)])
def test_they_do_on_tars_of_others(foreign: Run, tmp_path: Path, world: int, threads: int) -> None:
    reader = replace(foreign.reader, world=world, threads=threads, cache=tmp_path / "cache")
    goes_on(foreign, foreign.before, read_by_all(reader, foreign.release, foreign.steps[STOP:]), world)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world", [3, 4])
def test_processes_that_share_a_cache_do_and_fetch_each_block_once(own: Run, tmp_path: Path, world: int) -> None:
    reader = replace(own.reader, cache=tmp_path / "cache")
    before = read_by_processes(replace(reader, world=2), range(STOP))
    rest = read_by_processes(replace(reader, world=world), own.steps[STOP:])
    goes_on(own, before, rest, world)
    assert before.stats.cache_misses + rest.stats.cache_misses == own.whole.stats.cache_misses > 40


def test_the_releases_are_what_this_is_about(own: Run, foreign: Run) -> None:
    for run in (own, foreign):
        assert 15 <= len(run.release.shards("train")) <= 25
        assert 0.25 < missing(run.release) < 0.35
