"""A run that is killed and continued equals one that never was, bit for bit."""

import json
import random
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_runs import assert_same_run, interrupt_at, losses, run, tensors_at, validations
from forked_command import started
from small_runs import silent, small_job, small_release
from stop_after import StopAfter

from draf_dist.data.release import open_release
from draf_dist.errors import DataError, GateError, InterruptedRunError, SpecError
from draf_dist.storage import open_store
from draf_dist.training.exporting import export_best
from draf_dist.training.job import CheckpointConfig, FinetuneJob
from draf_dist.training.journal import read_lines
from draf_dist.training.ledger import receipts_by_epoch
from draf_dist.training.pin import pin
from draf_dist.training.run import attempt, begin
from draf_dist.training.run_folder import Fence, enter_run, open_run
from draf_dist.training.summary import summarise
from draf_dist.training.torch_engine import OneProcess
from draf_dist.training.trace import trace


@pytest.fixture(scope="module")
def release_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_release(tmp_path_factory.mktemp("data"), num_subjects=90, seed=1)


@pytest.fixture(scope="module")
def job(release_url: str) -> FinetuneJob:
    return small_job(release_url, checkpoint={"every_steps": 3, "keep": 3})


@pytest.fixture(scope="module")
def undisturbed(job: FinetuneJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(job, out).finished
    return out


def assert_each_study_once_per_epoch(out: Path, job: FinetuneJob) -> None:
    expected = open_release(job.release).manifest.receipts["train"]
    receipts = receipts_by_epoch(read_lines(open_store(str(out)), "ledger.jsonl"))
    assert receipts == dict.fromkeys(range(job.epochs), expected)


def test_a_run_consumes_each_study_once_per_epoch_and_logs_each_step_once(undisturbed: Path, job: FinetuneJob) -> None:
    assert_each_study_once_per_epoch(undisturbed, job)
    steps = [step for step, _ in losses(undisturbed)]
    assert steps == list(range(1, len(steps) + 1))
    assert all(loss > 0 for _, loss in losses(undisturbed))


def test_the_same_job_twice_gives_the_same_bits(undisturbed: Path, job: FinetuneJob, tmp_path: Path) -> None:
    torch.rand(1)  # the state of the global generator must not matter
    run(job, tmp_path / "again")
    assert_same_run(undisturbed, tmp_path / "again")


def test_another_seed_gives_another_run(undisturbed: Path, job: FinetuneJob, tmp_path: Path) -> None:
    run(job.model_copy(update={"seed": 1, "epochs": 1}), tmp_path / "other")
    assert losses(tmp_path / "other")[0] != losses(undisturbed)[0]


@pytest.mark.parametrize("step", [1, 3, 5], ids=["before the first checkpoint", "at a checkpoint", "in the middle of an epoch"])
def test_an_interrupted_run_continues_as_if_nothing_had_been(
    undisturbed: Path, job: FinetuneJob, tmp_path: Path, step: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, step)
        with pytest.raises(InterruptedRunError, match="the same command continues") as caught:
            run(job, tmp_path / "run")
    assert caught.value.exit_code == 5
    assert losses(tmp_path / "run") == losses(undisturbed)[:step]
    assert run(job, tmp_path / "run").finished
    found = summarise(str(tmp_path / "run")).goodput
    assert (found.stops, found.failures, found.lost_steps, found.attempts) == ({"SIGTERM": 1}, (), 0, 2)
    assert_same_run(undisturbed, tmp_path / "run")
    assert_each_study_once_per_epoch(tmp_path / "run", job)


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("asked", [0, 1], ids=["at the last step of an epoch", "during its validation"])
def test_no_validation_is_waited_for_and_it_is_made_later(
    undisturbed: Path, job: FinetuneJob, tmp_path: Path, epoch: int, asked: int
) -> None:
    """The checkpoint says that it is due; the next attempt begins with it, and all is as if nothing had been."""
    epoch_steps, batches = validations(undisturbed)[0][0], -(-num_validated(job) // job.batch_size)
    stop = StopAfter(epoch * epoch_steps + (epoch - 1) * batches + asked)
    job = job.model_copy(update={"checkpoint": CheckpointConfig(every_steps=3, keep=9)})
    folder = begin(job, str(tmp_path / "run"))
    with pytest.raises(InterruptedRunError, match=f"after step {epoch * epoch_steps} of"):
        attempt(folder.url, OneProcess(), silent(), stop)
    assert validations(tmp_path / "run") == validations(undisturbed)[: epoch - 1]
    saved = folder.checkpoints.at(epoch * epoch_steps).state
    assert (saved.due, saved.score) == (True, None)
    assert run(job, tmp_path / "run").finished
    saved = folder.checkpoints.at(epoch * epoch_steps).state
    assert (saved.due, saved.score) == (False, validations(undisturbed)[epoch - 1][1])
    assert_same_run(undisturbed, tmp_path / "run")
    assert_each_study_once_per_epoch(tmp_path / "run", job)
    found = summarise(str(tmp_path / "run"))
    assert (found.as_planned, found.goodput.lost_steps, found.goodput.failures) == (True, 0, ())
    assert found.goodput.wall_s == pytest.approx(sum(found.goodput.seconds.values()))


def num_validated(job: FinetuneJob) -> int:
    return open_release(job.release).manifest.receipts["val"].count


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(
    undisturbed: Path, job: FinetuneJob, tmp_path: Path
) -> None:
    """A real process gets SIGKILL at two random steps; every time the same job is given again."""
    out = tmp_path / "run"
    num_steps, reached = len(losses(undisturbed)), []
    for kill_after in sorted(random.Random(7).sample(range(1, num_steps - 2), 2)):
        kill_once(started(run, job, out), out / "metrics.jsonl", kill_after)
        reached.append(last_step(out / "metrics.jsonl"))
        assert open_run(str(out)).end() is None
    last = started(run, job, out)
    last.join(300)
    assert last.exitcode == 0
    assert_same_run(undisturbed, out)
    assert_each_study_once_per_epoch(out, job)
    assert_every_second_is_told(out, reached)


def assert_every_second_is_told(out: Path, reached: list[int]) -> None:
    """reached: steps that each of the attempts had done when it was killed."""
    ledger, found = open_run(str(out)).ledger(), summarise(str(out)).goodput
    attempts = [line for line in ledger if line["event"] == "attempt"]
    assert [failure.lost_steps for failure in found.failures] == [
        step - after["start"] for step, after in zip(reached, attempts[1:], strict=True)
    ]
    assert found.lost_steps == sum(failure.lost_steps for failure in found.failures) > 0
    assert found.wall_s == sum(found.seconds.values())
    assert found.wall_s == pytest.approx(ledger[-1]["time"] - attempts[0]["began"], abs=0.05)
    assert found.seconds["lost"] == pytest.approx(sum(failure.lost_s for failure in found.failures), abs=1e-3)
    assert found.seconds["restart"] == pytest.approx(sum(failure.restart_s for failure in found.failures), abs=1e-3)
    assert found.seconds["idle"] == 0
    kept = sum(line["compute_s"] for line in read_lines(open_store(str(out)), "metrics.jsonl") if line["event"] == "step")
    assert found.seconds["step"] == pytest.approx(kept, abs=1e-3)
    assert ledger[-1]["goodput"]["seconds"] == found.seconds


def kill_once(process: BaseProcess, metrics: Path, after: int) -> None:
    """Kills a process that trains once its attempt has recorded a step past `after`."""
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.stat().st_mtime_ns == before or last_step(metrics) <= after:
        assert process.exitcode is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()


def last_step(metrics: Path) -> int:
    lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
    return max((json.loads(line)["step"] for line in lines), default=0)


def test_a_broken_checkpoint_costs_its_steps_and_nothing_else(undisturbed: Path, job: FinetuneJob, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, 5)
        with pytest.raises(InterruptedRunError):
            run(job, tmp_path / "run")
    weights = tensors_at(tmp_path / "run", 5)
    weights.write_bytes(weights.read_bytes()[:-8])
    run(job, tmp_path / "run")
    assert_same_run(undisturbed, tmp_path / "run")
    assert_each_study_once_per_epoch(tmp_path / "run", job)


def test_a_finished_run_is_reported_and_not_touched(undisturbed: Path, job: FinetuneJob) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    again, resumed = run(job, undisturbed), run(job, undisturbed, resume=True)
    assert again == resumed
    assert again.best_loss == min(nll for _, nll in validations(undisturbed))
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_fresh_and_resume_exclude_each_other(job: FinetuneJob, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="expected one of them, found both"):
        run(job, tmp_path / "run", fresh=True, resume=True)


def test_an_attempt_that_was_overtaken_stops_at_its_next_checkpoint(undisturbed: Path, job: FinetuneJob, tmp_path: Path) -> None:
    from draf_dist.training.tracking import Tracker

    record = Tracker.step

    def overtaken(self: Tracker, report: Any, supply: Any) -> None:
        record(self, report, supply)
        if report.step == 4:
            while not open_run(str(tmp_path / "run")).checkpoints.steps():
                time.sleep(0.01)
            Fence.take(open_store(str(tmp_path / "run")))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Tracker, "step", overtaken)
        with pytest.raises(GateError, match="a later one"):
            run(job, tmp_path / "run")
    assert open_run(str(tmp_path / "run")).checkpoints.steps() == [3]
    # What it had written already is in nobody's way.
    assert run(job, tmp_path / "run").finished
    assert_same_run(undisturbed, tmp_path / "run")


def test_an_attempt_that_is_overtaken_while_it_restores_says_so(job: FinetuneJob, tmp_path: Path) -> None:
    """The later one has removed what this one inherited: that is no broken checkpoint, and no reason to begin anew."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, 3)
        with pytest.raises(InterruptedRunError):
            run(job, tmp_path / "run")
    take = Fence.take

    def overtaken(store: Any) -> Fence:
        fence = take(store)
        take(store)
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        return fence

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Fence, "take", overtaken)
        with pytest.raises(GateError, match="a later one"):
            run(job, tmp_path / "run")


def test_a_checkpoint_of_another_job_is_refused(job: FinetuneJob, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, 3)
        with pytest.raises(InterruptedRunError):
            run(job, tmp_path / "run")
    other = job.model_copy(update={"seed": 5})
    enter_run(str(tmp_path / "other"), pin(other), "continue")
    for part in ("checkpoints", "attempts"):
        shutil.copytree(tmp_path / "run" / part, tmp_path / "other" / part)
    with pytest.raises(DataError, match="expected a checkpoint of this job"):
        run(other, tmp_path / "other")


def test_an_attempt_that_was_overtaken_in_its_export_does_not_say_that_it_finished(job: FinetuneJob, tmp_path: Path) -> None:
    from draf_dist.training import run as running

    def export_and_overtake(folder: Any, stage: Any, step: int) -> None:
        export_best(folder, stage, step)
        Fence.take(folder.store)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(running, "export_best", export_and_overtake)
        with pytest.raises(GateError, match="a later one"):
            run(job.model_copy(update={"epochs": 1}), tmp_path / "run")
    assert open_run(str(tmp_path / "run")).end() is None


def test_trace_finds_every_use_of_a_study_that_the_receipts_count(undisturbed: Path, job: FinetuneJob) -> None:
    table = open_release(job.release).subjects().to_pylist()
    trained = next(row for row in table if row["split"] == "train")
    uses = trace(str(undisturbed), trained["uid"])
    assert [use.epoch for use in uses] == list(range(job.epochs))
    assert all(use.rank == 0 and use.world == 1 and use.entry < job.batch_size for use in uses)
    tested = next(row for row in table if row["split"] == "test")
    assert trace(str(undisturbed), tested["uid"]) == []
    with pytest.raises(SpecError, match="expected a study of"):
        trace(str(undisturbed), 12345)


def test_a_summary_is_read_from_the_folder_alone(undisturbed: Path, job: FinetuneJob) -> None:
    summary = summarise(str(undisturbed))
    assert summary.state == "finished"
    assert summary.epochs_complete == job.epochs
    assert summary.steps == len(losses(undisturbed))
    assert summary.best_loss == min(nll for _, nll in validations(undisturbed))
    found = summary.goodput
    assert {kind for kind, seconds in found.seconds.items() if seconds} == {
        "startup",
        "data_wait",
        "step",
        "validate",
        "checkpoint",
        "other",
    }
    assert (found.failures, found.lost_steps, found.stops) == ((), 0, {})


def test_no_name_of_a_subject_is_in_a_run(undisturbed: Path, job: FinetuneJob) -> None:
    subjects = set(open_release(job.release).subjects()["subject"].to_pylist())
    texts = [path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()]
    assert not any(subject.encode() in text for subject in subjects for text in texts)
