"""What watches over the steps: the recorder outlives a kill, slow ranks and bad losses are told from good ones."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from remote_folder import RemoteFolder
from rich.console import Console

from draf_dist.errors import DrafError, StorageFullError
from draf_dist.storage import open_store
from draf_dist.training.loop import StepReport
from draf_dist.training.schedule import SaveGrid
from draf_dist.training.torch_engine import OneProcess
from draf_dist.training.watch import watchdog
from draf_dist.training.watch.bad_loss import BadLoss
from draf_dist.training.watch.board import OwnBoard
from draf_dist.training.watch.flight import NUM_STEPS, FlightRecorder, read_flight, recover
from draf_dist.training.watch.health import BadStep, Health, Skipped, holds_skipped
from draf_dist.training.watch.ring import Ring, read_ring
from draf_dist.training.watch.room import OutOfMemoryError, oom_kills, told_what_to_lower
from draf_dist.training.watch.stacks import innermost, stack_of, stacks, waits_for_others
from draf_dist.training.watch.step_watch import Recording
from draf_dist.training.watch.stragglers import EVERY, Stragglers, find_slow
from draf_dist.training.watch.watchdog import Answer, Hang, Watchdog

UIDS = torch.tensor([3, 2**62 + 5, -1])
REPORT = StepReport(1, 0.5, {"task": 0.4}, 1e-3, 2.0, 2, UIDS, torch.zeros(3), 0.01, 0.02)


def test_a_ring_keeps_the_newest_records_in_order(tmp_path: Path) -> None:
    with Ring(tmp_path / "a.ring", {"rank": 1}, num_slots=3, record_bytes=20) as ring:
        for number in range(1, 6):
            ring.put(number, f"record {number}".encode())
        ring.put(5, b"five again")
        found = read_ring(ring.path)
    assert found.about == {"rank": 1}
    assert found.records == {3: b"record 3", 4: b"record 4", 5: b"five again"}


def test_a_record_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    with Ring(tmp_path / "a.ring", {}, num_slots=2, record_bytes=8) as ring:
        ring.put(1, b"whole")
        ring.put(2, b"torn")
    data = ring.path.read_bytes()
    ring.path.write_bytes(data.replace(b"torn", b"to\0\0"))
    assert read_ring(ring.path).records == {1: b"whole"}


def test_a_ring_has_all_of_its_blocks_from_the_start(tmp_path: Path) -> None:
    """On a full disk a page without a block would end the process by a signal."""
    with Ring(tmp_path / "a.ring", {}, num_slots=4, record_bytes=10_000) as ring:
        status = ring.path.stat()
    assert status.st_blocks * 512 >= status.st_size > 40_000


WRITER = """
import os, signal, sys, torch
from draf_dist.storage import open_store
from draf_dist.training.watch.flight import FlightRecorder
recorder = FlightRecorder(open_store(sys.argv[1]), attempt=7, rank=2, world=4, num_rows=2)
recorder.trouble("it hung once")
for step in range(1, 100):
    recorder.begin(step, torch.tensor([step, step + 1000]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_steps_of_a_killed_process_are_found_and_brought_to_the_run_folder(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    store = open_store(str(tmp_path))
    (told,) = recover(store)
    assert "rank 2 of attempt 7 was killed" in told
    assert "step 99" in told
    assert recover(store) == []
    found = read_flight(store, 7, 2)
    assert [step["step"] for step in found["steps"]] == list(range(100 - NUM_STEPS, 100))
    assert found["steps"][-1]["uids"] == [f"{99:016x}", f"{1099:016x}"]
    assert [trouble["what"].split(",")[0] for trouble in found["troubles"]] == ["it hung once", "killed"]
    assert store.list("flight") == ["flight/00000007-00002.json"]


def test_a_remote_run_keeps_its_ring_on_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "machine"))
    (tmp_path / "machine").mkdir()
    store = RemoteFolder(tmp_path / "bucket")
    recorder = FlightRecorder(store, 1, 0, 1, num_rows=3)
    recorder.begin(1, UIDS)
    assert store.list() == []
    assert recorder.trouble("it ended") is None
    recorder.close()
    assert store.list() == ["flight/00000001-00000.json"]
    assert not [path for path in (tmp_path / "machine").rglob("*") if path.is_file()]


def test_what_can_not_be_written_now_is_written_by_the_next_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    recorder = FlightRecorder(store, 1, 0, 1, num_rows=3)
    recorder.begin(1, UIDS)
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "write", full_disk)
        assert isinstance(recorder.trouble("it ended"), StorageFullError)
        recorder.close()
        assert "not written" in recover(store)[0]
    assert len(recover(store)) == 1
    assert [step["step"] for step in read_flight(store, 1, 0)["steps"]] == [1]


def full_disk(store: object, path: str, data: bytes) -> None:
    raise StorageFullError("full")


def test_a_machine_without_room_for_the_ring_says_so_once_and_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "machine").write_text("no folder")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "machine"))
    store, said = RemoteFolder(tmp_path / "bucket"), io.StringIO()
    recording = Recording(store, OneProcess(), Console(file=said, width=40), 1, num_rows=3)
    recording.flight.begin(1, UIDS)
    recording.trouble("it ended")
    (line,) = said.getvalue().splitlines()
    assert line.startswith("warning: rank 0: the last steps are not recorded: Not a directory (")
    found = read_flight(store, 1, 0)
    assert [trouble["what"] for trouble in found["troubles"]] == ["the last steps are not recorded: Not a directory", "it ended"]
    assert found["steps"] == []


def test_a_process_that_lives_keeps_its_ring(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    recorder = FlightRecorder(store, 1, 0, 1, num_rows=3)
    ring = tmp_path / "flight" / "00000001-00000.ring"
    data = ring.read_bytes()
    ring.write_bytes(
        data.replace(f'"pid": {os.getpid()}'.encode(), f'"pid": {os.getppid()}'.ljust(len(f'"pid": {os.getpid()}')).encode())
    )
    assert recover(store) == []
    assert ring.exists()
    recorder.close()
    assert not ring.exists()


def test_trouble_is_written_with_stacks_and_steps_and_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    recorder = FlightRecorder(store, 1, 0, 1, num_rows=3)
    recorder.begin(1, UIDS)
    recorder.end(replace(REPORT, loss=math.nan))
    recorder.begin(2, UIDS)
    assert recorder.trouble("it hangs") is None
    assert recorder.trouble("it ended") is None
    text = (tmp_path / "flight" / "00000001-00000.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert [trouble["what"] for trouble in found["troubles"]] == ["it hangs", "it ended"]
    main = next(lines for name, lines in found["troubles"][0]["stacks"].items() if name.startswith("MainThread"))
    assert any(line.endswith("test_trouble_is_written_with_stacks_and_steps_and_numbers_that_json_does_not_have") for line in main)
    assert "/" not in "".join(main)
    first, second = found["steps"]
    assert first["loss"] == "nan"
    assert first["uids"] == [f"{3:016x}", f"{2**62 + 5:016x}"]
    assert "loss" not in second


def test_recording_a_step_costs_next_to_nothing(tmp_path: Path) -> None:
    recorder = FlightRecorder(open_store(str(tmp_path)), 1, 0, 1, num_rows=64)
    report = replace(REPORT, uids=torch.arange(64), terms={f"term {i}": 0.1 for i in range(6)})
    began = time.perf_counter()
    for step in range(1, 1001):
        recorder.begin(step, report.uids)
        recorder.end(replace(report, step=step))
    # About 40 us where it was written; the bound is for a busy machine.
    assert (time.perf_counter() - began) / 1000 < 1e-3


def test_the_stack_of_a_thread_tells_what_it_waits_for() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="waiter")
    thread.start()
    found = stack_of(thread.ident or 0)
    assert not waits_for_others(found)
    assert waits_for_others(["torch.distributed.distributed_c10d:1 all_reduce", *found])
    assert innermost([*found, "draf_dist.data.loader:9 batches"]) == "draf_dist.data.loader:9 batches"
    assert any(name.startswith("waiter-") for name in stacks())
    release.set()
    thread.join()


@pytest.mark.parametrize(
    ("own", "slow"),
    [
        ([0.05, 0.35], [1]),
        ([0.35, 0.05], [0]),
        ([0.05, 0.051, 0.35, 0.049], [2]),
        ([0.05, 0.055], []),
        ([0.1, 0.12, 0.09, 0.11, 0.13, 0.1], []),
        ([0.05], []),
    ],
)
def test_a_rank_is_slow_by_what_the_others_need(own: list[float], slow: list[int]) -> None:
    assert find_slow(own, step_s=max(own) + 0.02) == slow


def test_a_rank_that_costs_next_to_nothing_of_a_step_is_not_slow() -> None:
    assert find_slow([0.001, 0.010], step_s=2.0) == []


def test_a_slow_rank_is_named_once_and_a_single_hiccup_is_not() -> None:
    """Two ranks of which this test plays the other."""
    others = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.02, 0.4]], dtype=torch.float64)
    stragglers = Stragglers(0, 2, lambda mine: mine + others, torch.device("cpu"))
    told = [stragglers.add(0.0, 5.0 if step == 3 else 0.02, 0.4) for step in range(4 * EVERY)]
    assert not any(told)
    told = [stragglers.add(0.31, 0.02, 0.4) for _ in range(6 * EVERY)]
    assert [number for number, found in enumerate(told, 1) if found] == [2 * EVERY]
    (slow,) = told[2 * EVERY - 1]
    assert slow.message == "rank 0 is slow: 0.310 s a step for data, the others 0.000 s"


def test_a_hang_names_those_who_did_not_arrive() -> None:
    answers = {
        0: Answer(9, "step", True, "draf_dist.training.loop:1 _sums"),
        1: Answer(9, "data", False, "draf_dist.data.loader:2 batches"),
        2: None,
        3: Answer(9, "step", False, "draf_dist.data.normalise:3 __call__"),
    }
    hang = Hang(9, 31.0, answers)
    assert hang.missing == [1, 2, 3]
    message = hang.message("flight/x.json")
    assert (
        "rank 1: waiting for data, step 9, in draf_dist.data.loader:2 batches; rank 2: does not answer; rank 3: computing"
        in message
    )
    assert "rank 0" not in message


def test_a_step_that_does_not_end_is_heard_of_and_one_that_is_only_validated_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "FLOOR_S", 0.2)
    monkeypatch.setattr(watchdog, "POLL_S", 0.02)
    heard: list[Hang] = []
    with Watchdog(0, 1, OwnBoard(), heard.append) as dog:
        for step in range(1, 4):
            dog.at(step, "data")
            dog.at(step, "step")
        dog.at(3, "between")
        time.sleep(0.5)
        assert not heard
        dog.at(4, "step")
        time.sleep(0.6)
    (hang,) = heard
    assert hang.step == 4
    assert hang.missing == [0]


def test_the_limit_follows_the_median_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "FLOOR_S", 0.001)
    dog = Watchdog(0, 1, OwnBoard(), lambda hang: None)
    for step in range(1, 4):
        dog.at(step, "step")
        time.sleep(0.02)
        dog.at(step, "between")
    assert 0.2 <= dog.limit_s < 1.0


def judged(health: Health, losses: list[float]) -> list[bool]:
    return [health.judge("loss", loss) is not None for loss in losses]


def test_a_loss_is_bad_that_is_not_finite_or_far_from_the_usual() -> None:
    usual = [1.0 + 0.01 * step for step in range(30)]
    assert judged(Health(BadLoss()), [*usual, 500.0, math.inf, math.nan]) == [False] * 31 + [True, True]
    assert judged(Health(BadLoss(exploding=10)), [*usual, 9.0, 500.0, 1.0]) == [False] * 31 + [True, False]
    assert judged(Health(None), [math.nan]) == [False]


def test_nothing_is_far_before_there_is_a_usual() -> None:
    assert judged(Health(BadLoss(exploding=10)), [1.0, 500.0, 1.0]) == [False, False, False]


def test_an_attempt_knows_what_the_one_before_it_saw() -> None:
    metrics = [{"event": "step", "step": step, "loss": 1.0, "gradient_norm": 2.0} for step in range(1, 41)]
    ledger = [{"event": "skipped", "start": 5, "stop": 7, "why": "loss nan"}]
    health = Health.at(BadLoss(exploding=10), ledger, metrics, start=30)
    assert health.judge("loss", 11.0) is not None
    assert health.judge("gradient", 21.0) is not None
    assert [step for step in range(10) if health.skipped_at(step)] == [5, 6]
    assert Health.at(BadLoss(exploding=10), ledger, metrics, start=10).judge("loss", 11.0) is None


def test_bad_steps_one_after_the_other_end_the_run() -> None:
    health = Health(BadLoss(action="skip", at_most=2))
    for step in (4, 5):
        assert health.skip_or_raise(step, "loss nan") == Skipped(step, step + 1, "loss nan")
    with pytest.raises(DrafError, match="3. bad step in a row"):
        health.skip_or_raise(6, "loss nan")
    assert health.skip_or_raise(8, "loss nan").start == 8


def test_rolling_back_skips_everything_since_the_checkpoint() -> None:
    """Saved after 4 steps of an epoch of 100, after 8, and so on: whatever else was saved does not count."""
    health = Health(BadLoss(action="roll_back", at_most=2), last_save=SaveGrid(4, 100).last)
    for step, start in ((6, 4), (7, 4)):
        with pytest.raises(BadStep) as caught:
            health.skip_or_raise(step, "loss nan")
        assert health.skip(caught.value) == Skipped(start, step + 1, "loss nan")
    with pytest.raises(DrafError, match="in a row"):
        health.skip_or_raise(8, "loss nan")


def test_a_checkpoint_from_before_a_step_was_found_to_be_skipped_goes_too_far() -> None:
    ledger = [{"event": "skipped", "attempt": 3, "start": 8, "stop": 12, "why": "loss nan"}]
    found = {(step, attempt) for step in (4, 8, 9, 12) for attempt in (2, 3, 4) if holds_skipped(ledger, step, attempt)}
    assert found == {(9, 2), (12, 2)}


def test_one_skipped_step_can_be_done_all_the_same() -> None:
    health = Health(None, [Skipped(2, 6, "loss nan"), Skipped(9, 10, "loss nan")])
    assert [step for step in range(12) if health.but_for(4).skipped_at(step)] == [2, 3, 5, 9]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "memory of cpu: .* accumulation: 4 .*found 2"),
        (MemoryError(), "memory of this machine: .*decode_threads"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory of this machine"),
        (OSError(12, "Cannot allocate memory"), "memory of this machine"),
    ],
)
def test_a_full_memory_says_what_to_lower(error: Exception, words: str) -> None:
    with pytest.raises(OutOfMemoryError, match=words), told_what_to_lower(OneProcess(accumulation=2)):
        raise error


def test_memory_that_really_can_not_be_had_says_what_to_lower() -> None:
    with pytest.raises(OutOfMemoryError), told_what_to_lower(OneProcess()):
        torch.empty(2**60, dtype=torch.uint8)


def test_a_full_disk_says_what_to_lower_and_other_errors_stay(tmp_path: Path) -> None:
    with pytest.raises(StorageFullError, match="checkpoint.keep"), told_what_to_lower(OneProcess()):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))
    with pytest.raises(RuntimeError, match="something else"), told_what_to_lower(OneProcess()):
        raise RuntimeError("something else")


def test_kills_for_memory_are_read_from_either_kind_of_group(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) is None
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert oom_kills(tmp_path) == 2
