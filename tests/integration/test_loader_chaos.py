"""Everything that can happen between a loader and its bucket in mid-epoch: the right batches or the right error, never a hang.

The server is real; what happens to its answers is up to tests/fault_server.py. benchmarks/chaos.py does the same for longer.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fault_server import FaultServer
from faulty_line import (
    BEGIN,
    SMALL_BLOCKS,
    STORMS,
    Place,
    barely,
    drawn_at,
    fails,
    fetched_once_an_epoch,
    loader_threads,
    read_through,
    upload,
)
from reading_ranks import RankProcess, Seen, ranks, read, read_by_processes
from small_disk import small_disk

from draf_dist.data.bad_data import BadData
from draf_dist.data.release import Release, index_path, open_release, tar_path
from draf_dist.data.shard_reader import ShardReader
from draf_dist.errors import DataError, StorageFullError, UnreachableError
from draf_dist.launch.local_s3 import LocalS3
from draf_dist.storage import open_store

QUARANTINE = BadData(policy="quarantine", limit=0.5)
# Closing and raising wait for what is under way, on a machine that may be busy.
SOON_S = 10.0


@pytest.fixture(scope="module")
def uploaded(s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Release]:
    return upload(s3_server, tmp_path_factory.mktemp("few"), 500, 16)


@pytest.fixture(scope="module")
def uploaded_many(s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Release]:
    return upload(s3_server, tmp_path_factory.mktemp("many"), 1800, 450)


@pytest.fixture
def faults(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    with FaultServer(s3_server.endpoint) as faults:
        for name, value in {**s3_server.environment, "AWS_ENDPOINT_URL": faults.url, "DRAF_STALL_TIMEOUT_S": "1"}.items():
            monkeypatch.setenv(name, value)
        yield faults


@pytest.fixture
def place(
    uploaded: tuple[str, Release], faults: FaultServer, s3_server: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    for module in ("remote_shards", "loader"):
        monkeypatch.setattr(f"draf_dist.data.{module}.BLOCK_BYTES", SMALL_BLOCKS)
    monkeypatch.setattr("draf_dist.data.pipeline.AHEAD_STEPS", 2)
    return Place(*uploaded, faults, s3_server, tmp_path / "cache")


# What passes


@pytest.mark.timeout(120)
@pytest.mark.parametrize("storm", STORMS)
def test_what_passes_leaves_no_trace_in_the_batches(place: Place, storm: str) -> None:
    seen = read_through(place, lambda: STORMS[storm](place.faults))
    assert seen.rows == place.expected().rows
    assert seen.receipt(place.steps) == place.local.manifest.receipts["train"]
    assert seen.stats.retries >= 4


@pytest.mark.timeout(120)
def test_a_server_that_is_stopped_and_started_again_is_waited_for(place: Place) -> None:
    before = place.server.pid

    def restart() -> None:
        place.server.stop()
        threading.Timer(1.0, place.server.start).start()

    seen = read_through(place, restart)
    assert place.server.pid not in (None, before)
    assert seen.rows == place.expected().rows
    assert seen.receipt(place.steps) == place.local.manifest.receipts["train"]
    assert seen.stats.retries > 0


# What does not


@pytest.mark.timeout(120)
def test_a_corrupt_object_ends_the_run_at_its_step_and_is_named(place: Place) -> None:
    step = BEGIN + 8
    shard, byte, _, member = drawn_at(place, step, "vitals")
    error, seen, _ = fails(place, lambda: place.faults.flip(byte, key=f"{shard}.tar"), DataError)
    assert shard in str(error)
    assert member in str(error)
    expected = place.expected()
    assert seen.rows == {before: expected.rows[before] for before in range(step)}


@pytest.mark.timeout(120)
def test_under_quarantine_it_costs_that_member_and_nothing_else(place: Place) -> None:
    step = BEGIN + 8
    shard, byte, uid, member = drawn_at(place, step, "vitals")
    seen = read_through(place, lambda: place.faults.flip(byte, key=f"{shard}.tar"), bad_data=QUARANTINE)
    changed = {row for rows in place.expected().rows.values() for row in rows} - {
        row for rows in seen.rows.values() for row in rows
    }
    assert {changed_uid for changed_uid, _ in changed} == {uid}
    assert seen.receipt(place.steps) == place.local.manifest.receipts["train"]
    (told,) = seen.left_out
    assert (told.step, shard in told.message, member in told.message) == (step, True, True)


@pytest.mark.timeout(60)
def test_credentials_that_expire_end_the_run_at_once(place: Place) -> None:
    error, seen, seconds = fails(place, place.faults.deny, UnreachableError)
    assert "found expired ones (ExpiredToken). Renew them" in str(error)
    assert len(seen.rows) < len(place.steps)
    assert seconds < SOON_S


@pytest.fixture
def late_shard(place: Place) -> Iterator[tuple[int, Callable[[], None]]]:
    """A shard of which nothing is drawn before BEGIN + 5, and how to remove it; it is put back."""
    reader = ShardReader(place.local, "train")
    order = place.reader().order(place.local)
    early = np.concatenate([order.draws(step).sample for step in range(BEGIN + 5)])
    number = min(set(range(len(reader.shards))) - set(reader.locate(early)[0].tolist()))
    path = tar_path(reader.shards[number])
    store = open_store(place.url)
    content = store.read(path)
    yield number, lambda: store.delete(path)
    store.write(path, content)


@pytest.mark.timeout(120)
def test_a_shard_that_vanishes_is_named(place: Place, late_shard: tuple[int, Callable[[], None]]) -> None:
    number, vanish = late_shard
    error, seen, seconds = fails(place, vanish, DataError)
    assert f"shard {place.local.shards('train')[number].sha256}: expected a shard, found nothing" in str(error)
    assert seen.rows.items() <= place.expected().rows.items()
    assert seconds < SOON_S


def costs_the_samples_of(place: Place, seen: Seen, number: int) -> None:
    """Nothing else is missing or changed, and all that is missing is told."""
    lost = set(place.local.index(place.local.shards("train")[number]).uids.tolist())
    rows = {row for rows in seen.rows.values() for row in rows}
    assert rows == {row for rows in place.expected().rows.values() for row in rows if row[0] not in lost}
    assert seen.stats.left_out == len(lost)
    assert all(sizes == [16] for sizes in seen.num_rows.values())


@pytest.mark.timeout(120)
def test_under_quarantine_it_costs_its_samples(place: Place, late_shard: tuple[int, Callable[[], None]]) -> None:
    number, vanish = late_shard
    costs_the_samples_of(place, read_through(place, vanish, bad_data=QUARANTINE), number)


@pytest.mark.timeout(120)
def test_so_does_a_missing_index_and_it_is_named(place: Place) -> None:
    shard = place.local.shards("train")[3]
    store = open_store(place.url)
    content = store.read(index_path(shard))
    store.delete(index_path(shard))
    try:
        error, _, _ = fails(place, lambda: None, DataError)
        assert f"{shard.sha256}.idx: expected" in str(error)
        costs_the_samples_of(place, read_through(place, lambda: None, bad_data=QUARANTINE, cache=place.cache / "2"), 3)
    finally:
        store.write(index_path(shard), content)


@pytest.mark.timeout(120)
def test_indexes_that_come_too_short_twice_are_read_again(place: Place) -> None:
    for shard in place.local.shards("train"):
        place.faults.shorten(to_bytes=100, times=2, key=index_path(shard))
    assert read_through(place, lambda: None).rows == place.expected().rows


@pytest.mark.timeout(60)
def test_a_cache_disk_that_is_full_is_named(place: Place, tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", 1) as disk,
        pytest.raises(StorageFullError, match=f"{disk}/cache: expected room on the disk"),
    ):
        read(place.reader(cache=disk / "cache"), open_release(place.url), place.steps)


# The cache of a node


@pytest.fixture
def many(uploaded_many: tuple[str, Release], faults: FaultServer, s3_server: LocalS3, tmp_path: Path) -> Place:
    return Place(*uploaded_many, faults, s3_server, tmp_path / "cache")


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_small_cache_fetches_every_byte_once_an_epoch(many: Place) -> None:
    reader = barely(many)
    steps = range(2 * reader.order(many.local).steps_per_epoch)
    fetched_once_an_epoch(many, reader, read(reader, open_release(many.url), steps), 2)


@pytest.mark.timeout(120)
def test_so_do_two_processes_that_share_it(many: Place) -> None:
    reader = replace(barely(many), world=2)
    steps = range(2 * reader.order(many.local).steps_per_epoch)
    fetched_once_an_epoch(many, reader, read_by_processes(reader, steps, lockstep=True), 2)


# Ends


@pytest.mark.timeout(120)
def test_a_killed_rank_holds_nobody_up_and_is_succeeded(place: Place) -> None:
    reader, whole = place.reader(world=2), place.expected()
    shares = [read(replace(reader, rank=rank), place.local, place.steps).rows for rank in range(2)]
    place.faults.slow(100_000, key=".tar")
    with ranks(reader, place.steps) as (survivor, killed):
        killed.wait_for_step(BEGIN)
        killed.kill()
        assert killed.process.exitcode == -9
        place.faults.clear()
        successor = RankProcess(replace(reader, rank=1), place.steps[BEGIN:])
        assert survivor.result().rows == shares[0]
        assert successor.result().rows == {step: shares[1][step] for step in place.steps[BEGIN:]}
    assert len(whole.rows) == len(shares[0])
    assert [list((place.cache / part).iterdir()) for part in ("leases", "unfinished")] == [[], []]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["stall", "503"])
def test_closing_waits_for_no_server_and_its_threads_end_when_that_answers(place: Place, name: str) -> None:
    silence = {"stall": lambda: place.faults.stall(60, times=None), "503": lambda: place.faults.next(503, times=None)}
    with closing(place.reader(prefetch=4).loader(open_release(place.url)).batches()) as batches:
        next(batches)
        silence[name]()
        time.sleep(0.5)
        begun = time.monotonic()
    assert time.monotonic() - begun < SOON_S
    assert loader_threads()
    place.faults.clear()
    while loader_threads():
        assert time.monotonic() - begun < 60
        time.sleep(0.05)
