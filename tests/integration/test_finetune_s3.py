"""A run folder in a bucket: everything that a local one holds, and a continued run that equals an undisturbed one."""

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_runs import small_job, small_model, small_release
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from draf_dist.data.release import open_release
from draf_dist.errors import InterruptedRunError
from draf_dist.storage import open_store
from draf_dist.training.job import FinetuneJob
from draf_dist.training.journal import read_lines
from draf_dist.training.ledger import receipts_by_epoch
from draf_dist.training.run import train
from draf_dist.training.tracking import TENSORBOARD, Tracker


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> FinetuneJob:
    folder = tmp_path_factory.mktemp("data")
    release, checkpoint = small_release(folder, num_subjects=60, seed=2), {"every_steps": 2, "keep": 2}
    return small_job(release, model=small_model("mean"), epochs=2, checkpoint=checkpoint, passes_train=1, passes_eval=2)


def losses(url: str) -> list[tuple[int, float]]:
    lines = read_lines(open_store(url), "metrics.jsonl")
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]


def test_a_run_in_a_bucket_survives_an_interruption(
    s3: Any, job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Console(file=io.StringIO())
    local, remote = str(tmp_path / "local"), f"{s3.url}/runs/first"
    train(job, local, console=quiet)

    record = Tracker.step

    def recorded(self: Tracker, report: Any, supply: Any) -> None:
        record(self, report, supply)
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "step", recorded)
        with pytest.raises(InterruptedRunError):
            train(job, remote, console=quiet)
    assert losses(remote) == losses(local)[:3]
    assert train(job, remote, console=quiet).finished

    store = open_store(remote)
    assert losses(remote) == losses(local)
    assert store.read("model/model.safetensors") == open_store(local).read("model/model.safetensors")
    expected = open_release(job.release).manifest.receipts["train"]
    assert receipts_by_epoch(read_lines(store, "ledger.jsonl")) == {0: expected, 1: expected}
    assert_tensorboard_shows_every_step_once(remote, tmp_path / "events")


def test_a_broken_checkpoint_in_a_bucket_falls_back(s3: Any, job: FinetuneJob) -> None:
    said = io.StringIO()
    url = f"{s3.url}/run"
    train(job, url, console=Console(file=said))
    store = open_store(url)
    store.delete("ledger.jsonl")  # as if it had been killed before it could say that it was finished
    last = max(path.split("/")[1] for path in store.list("checkpoints"))
    weights = f"checkpoints/{last}/rank-00000.safetensors"
    store.write(weights, store.read(weights)[:-1])
    expected = losses(url)
    assert train(job, url, console=Console(file=said, width=1000)).finished
    assert f"warning: {store.where(weights)}: expected" in said.getvalue()
    assert losses(url) == expected
    assert last == f"step-{len(expected):08d}-a0000001"


def assert_tensorboard_shows_every_step_once(url: str, folder: Path) -> None:
    store = open_store(url)
    folder.mkdir()
    for path in store.list(TENSORBOARD):
        (folder / path.rsplit("/", 1)[1]).write_bytes(store.read(path))
    events = EventAccumulator(str(folder)).Reload().Scalars("train/loss")  # type: ignore[no-untyped-call]
    assert [event.step for event in events] == [step for step, _ in losses(url)]
