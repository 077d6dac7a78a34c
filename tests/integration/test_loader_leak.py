"""Fifty epochs in one process hold no more than the first few: memory, open files, threads. `make leak` does it on more data."""

import os
import secrets
from pathlib import Path

import pytest
from conftest import S3
from reading_for_long import WARM_UP, Held, train_in_process
from reading_ranks import PROCESSES, Reader
from remote_release import own_release, put

from draf_dist.data.release import Release

EPOCHS = 50
WAIT_S = 120
# Connections that are used again, and the threads that wait for them, come and go; one an epoch that stays would make forty.
COME_AND_GO = 10


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return own_release(tmp_path_factory.mktemp("leak") / "release", 250, 12)


def held_by(reader: Reader) -> Held:
    ours, theirs = PROCESSES.Pipe()
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "DRAF_"))}
    process = PROCESSES.Process(target=train_in_process, args=(reader, EPOCHS, environment, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(WAIT_S), "fifty short epochs take longer than that"
        held = ours.recv()
    finally:
        process.kill()
        process.join(WAIT_S)
    assert isinstance(held, Held)
    return held


def nothing_grows(held: Held, num_samples: int) -> None:
    assert held.samples == [num_samples] * EPOCHS
    assert held.mib_per_epoch <= 0.1
    assert max(held.files[WARM_UP:]) <= max(held.files[:WARM_UP]) + COME_AND_GO
    assert max(held.files) < 150
    assert max(held.threads[WARM_UP:]) <= max(held.threads[:WARM_UP]) + COME_AND_GO
    assert held.left == []


def num_samples(release: Release) -> int:
    return sum(shard.num_samples for split in ("train", "val") for shard in release.shards(split))


@pytest.mark.timeout(240)
def test_reading_a_folder_holds_nothing(release: Release, tmp_path: Path) -> None:
    nothing_grows(held_by(Reader(release.url, tmp_path / "cache", batch_size=16)), num_samples(release))


@pytest.mark.timeout(240)
def test_nor_does_reading_a_bucket_through_a_cache(
    s3: S3, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DRAF_CACHE_BYTES", "1GB")
    url = f"{s3.url}/{secrets.token_hex(4)}"
    put(Path(release.url), url)
    nothing_grows(held_by(Reader(url, tmp_path / "cache", batch_size=16)), num_samples(release))
