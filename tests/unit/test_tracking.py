"""metrics.jsonl and TensorBoard: every step once, whatever happened to earlier attempts."""

import io
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from draf_dist.data.loader_stats import LoaderStats
from draf_dist.errors import DataError, StorageFullError
from draf_dist.storage import Store, open_store
from draf_dist.storage.local import LocalStore
from draf_dist.training.books import OpenBooks
from draf_dist.training.journal import Journal, Line, read_lines
from draf_dist.training.ledger import FILE as LEDGER
from draf_dist.training.ledger import Ledger
from draf_dist.training.loop import StepReport
from draf_dist.training.progress import ProgressLine
from draf_dist.training.run_folder import Fence
from draf_dist.training.tracking import METRICS, TENSORBOARD, Tracker
from draf_dist.training.watch.health import RollBack
from draf_dist.training.watch.last_step import Progress


def report_at(step: int, loss: float = 0.5) -> StepReport:
    ids = torch.arange(4)
    return StepReport(
        step=step,
        loss=loss,
        terms={"task": loss},
        learning_rate=1e-3,
        gradient_norm=1.0,
        samples=4,
        uids=ids,
        epochs=ids * 0,
        wait_s=0.01,
        compute_s=0.09,
    )


def lines(store: Store) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in read_lines(store, METRICS)]


def test_a_validation_that_is_to_be_made_again_does_not_stand_there_twice(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with Tracker(store, 0) as tracker:
        for step in (1, 2):
            tracker.step(report_at(step), LoaderStats())
            tracker.epoch(step, step, {"nll": 0.6})
    with Tracker(store, 2, due=True):
        pass
    assert lines(store) == [("step", 1), ("epoch", 1), ("step", 2)]


def test_a_new_attempt_takes_out_what_lies_past_its_checkpoint(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with Tracker(store, 0) as tracker:
        for step in (1, 2, 3):
            tracker.step(report_at(step), LoaderStats())
        tracker.epoch(1, 3, {"nll": 0.6})
        tracker.flush()
        for step in (4, 5):
            tracker.step(report_at(step), LoaderStats())
    with Tracker(store, 3) as tracker:
        tracker.step(report_at(4, loss=0.25), LoaderStats())
    assert lines(store) == [("step", 1), ("step", 2), ("step", 3), ("epoch", 3), ("step", 4)]
    assert read_lines(store, METRICS)[-1]["loss"] == 0.25


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    (tmp_path / METRICS).write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert lines(store) == [("step", 1)]
    journal = Journal(store, METRICS)
    journal.append({"event": "step", "step": 2})
    journal.close()
    assert lines(store) == [("step", 1), ("step", 2)]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"event": "step", "step": 1}\n{"event\n{"event": "step", "step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2: expected a JSON object"):
        read_lines(open_store(str(tmp_path)), METRICS)


def test_a_local_file_can_be_watched_while_the_run_goes_on(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with Tracker(store, 0) as tracker:
        tracker.step(report_at(1), LoaderStats())
        assert lines(store) == [("step", 1)]


def test_an_older_attempt_that_still_runs_writes_where_nobody_looks(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with Tracker(store, 0) as old:
        old.step(report_at(1), LoaderStats())
        with Tracker(store, 0) as new:
            old.step(report_at(2), LoaderStats())
            new.step(report_at(1, loss=0.25), LoaderStats())
            assert [line["loss"] for line in read_lines(store, METRICS)] == [0.25]


def log_steps(store: Store, num_steps: int) -> None:
    with Tracker(store, 0) as tracker:
        for step in range(1, num_steps + 1):
            tracker.step(report_at(step), LoaderStats())


def test_a_disk_that_fills_up_while_steps_are_logged_is_named(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        with pytest.raises(StorageFullError, match="expected room on the disk"):
            log_steps(open_store(str(tmp_path)), 3000)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_nan_is_refused_because_it_is_no_json(tmp_path: Path) -> None:
    journal = Journal(open_store(str(tmp_path)), METRICS)
    with pytest.raises(ValueError, match="JSON"):
        journal.append({"loss": float("nan")})
    journal.close()


class Far(LocalStore):
    """A store to which nothing can be appended. meanwhile: what happens while it is written to."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def local_path(self, path: str) -> None:
        return None

    def write(self, path: str, data: bytes | memoryview) -> None:
        self.meanwhile()
        super().write(path, data)


def test_on_a_remote_store_a_line_is_encoded_once_however_often_the_file_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Line] = []
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda line, **options: encoded.append(line) or dumps(line, **options))
    store = Far(tmp_path)
    journal = Journal(store, METRICS)
    for step in range(1, 11):
        journal.append({"event": "step", "step": step})
        journal.flush()
    assert [line["step"] for line in encoded] == list(range(1, 11))
    assert journal.lines == tuple(read_lines(store, METRICS)) == tuple(encoded)


def test_a_line_that_comes_while_the_file_is_sent_is_in_the_next(tmp_path: Path) -> None:
    store = Far(tmp_path)
    journal = Journal(store, METRICS)
    journal.append({"event": "step", "step": 1})
    store.meanwhile = lambda: journal.append({"event": "step", "step": 2})
    journal.flush()
    assert lines(store) == [("step", 1)]
    store.meanwhile = lambda: None
    journal.flush()
    assert lines(store) == [("step", 1), ("step", 2)]


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (DataError("a broken shard"), ("failed", "DataError", True)),
        (RuntimeError("a rank is gone"), ("failed", "RuntimeError", False)),
        (RollBack(), ("rolled_back", "bad loss", True)),
    ],
)
def test_the_books_say_whether_an_error_was_foreseen(tmp_path: Path, error: Exception, end: tuple[str, str, bool]) -> None:
    store, console = open_store(str(tmp_path)), Console(file=io.StringIO())
    fence = Fence.take(store)
    ledger = Ledger(Journal(store, LEDGER), fence.attempt.number, 0, 1, 1, 1)
    ledger.open(None)
    line = ProgressLine(console, num_steps=20, steps_per_epoch=10, start=0)
    OpenBooks(fence, ledger, cast(Tracker, None), line, Progress(store, fence.attempt.number)).broke(error)
    last = read_lines(store, LEDGER)[-1]
    assert (last["outcome"], last["reason"], last["foreseen"]) == end


def test_tensorboard_shows_every_step_once(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with Tracker(store, 0) as tracker:
        for step in (1, 2, 3):
            tracker.step(report_at(step), LoaderStats())
    # TensorBoard orders the files of one second by a counter of the process, as text.
    time.sleep(1.0)
    with Tracker(store, 2) as tracker:
        tracker.step(report_at(3, loss=0.25), LoaderStats())
        tracker.epoch(1, 3, {"nll": 0.75})
    found = EventAccumulator(str(tmp_path / TENSORBOARD)).Reload()  # type: ignore[no-untyped-call]
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert [event.value for event in found.Scalars("val/nll")] == [0.75]


def test_away_from_a_terminal_there_is_one_plain_line_per_epoch() -> None:
    text = io.StringIO()
    console = Console(file=text, width=60)
    with ProgressLine(console, num_steps=20, steps_per_epoch=10, start=0) as progress:
        for step in range(1, 11):
            progress.step(report_at(step))
        progress.epoch(1, 0.5, {"nll": 0.6, "auroc": 0.7}, best=True)
    assert text.getvalue() == "epoch 1/2  loss 0.5000  val nll 0.6000  val auroc 0.7000  40 samples/s  best so far\n"


def test_on_a_terminal_the_line_shows_loss_rate_and_time_left() -> None:
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    with ProgressLine(console, num_steps=20, steps_per_epoch=10, start=10) as progress:
        progress.step(report_at(11))
    shown = text.getvalue()
    assert "epoch 2/2" in shown
    assert "step 11/20" in shown
    assert "40 samples/s" in shown


def test_lines_are_json_objects_with_what_a_plot_needs(tmp_path: Path) -> None:
    with Tracker(open_store(str(tmp_path)), 0) as tracker:
        tracker.step(report_at(1), LoaderStats())
    line = json.loads((tmp_path / METRICS).read_text())
    assert set(line) == {
        "event",
        "step",
        "loss",
        "learning_rate",
        "gradient_norm",
        "terms",
        "samples",
        "wait_s",
        "compute_s",
        "data",
        "time",
    }
