"""A step that goes bad is skipped, rolled back or ends the run, the same after any kill; and it can be done again, and compared."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import silent, small_job, small_release
from stop_after import StopAfter
from torch import Tensor
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.data.release import open_release
from draf_dist.errors import DrafError, InterruptedRunError, SpecError
from draf_dist.schema.batch import Batch
from draf_dist.training.finetune import Finetuning
from draf_dist.training.job import FinetuneJob
from draf_dist.training.loop import StepRules
from draf_dist.training.plan import build_plan
from draf_dist.training.replay import replay, saved_steps, saved_tensors
from draf_dist.training.run import attempt, begin, train
from draf_dist.training.run_diff import diff_runs
from draf_dist.training.run_folder import open_run
from draf_dist.training.torch_engine import OneProcess, TorchEngine

# Steps counted from 0; checkpoints every EVERY steps.
BAD, EVERY = 4, 3


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> FinetuneJob:
    release = small_release(tmp_path_factory.mktemp("data"), num_subjects=60, seed=1)
    return small_job(release, epochs=2, checkpoint={"every_steps": EVERY, "keep": 9})


@pytest.fixture(scope="module")
def undisturbed(job: FinetuneJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train(job, str(out), console=silent())
    return out


def on_bad_loss(job: FinetuneJob, **rule: Any) -> FinetuneJob:
    return FinetuneJob.model_validate({**job.model_dump(), "on_bad_loss": rule})


def uids_of(job: FinetuneJob, step: int) -> set[int]:
    """What the plan draws in a step."""
    plan = build_plan(job, open_release(job.release))
    draws = plan.order.draws(step)
    uids = plan.sources[0].uids()
    return {int(uids[sample]) for sample in draws.sample}


@contextmanager
def poisoned(job: FinetuneJob, *steps: int) -> Iterator[None]:
    """The loss of these steps of the first epoch is NaN, whoever computes it and however often."""
    bad = [uids_of(job, step) for step in steps]
    rules_of = Finetuning.rules

    def rules(self: Finetuning, backend: Any) -> StepRules:
        rules = rules_of(self, backend)

        def prepare(batch: Batch) -> Batch:
            mine = {int(uid) for uid in batch.uid.tolist() if uid >= 0}
            found = rules.prepare(batch)
            poison = math.nan if any(mine <= uids for uids in bad) and not batch.epoch.any() else 1.0
            return replace(found, weight=found.weight * poison)

        return replace(rules, prepare=prepare)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finetuning, "rules", rules)
        yield


def skipped_lines(out: Path) -> list[tuple[int, int]]:
    return [(line["start"], line["stop"]) for line in open_run(str(out)).ledger() if line["event"] == "skipped"]


def weights(out: Path) -> dict[str, Tensor]:
    folder = open_run(str(out))
    return dict(saved_tensors(folder, saved_steps(folder)[-1]))


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in open_run(str(out)).metrics() if line["event"] == "step"}


def assert_same(left: Path, right: Path) -> None:
    assert losses(left) == losses(right)
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def told_to_skip(job: FinetuneJob, out: Path, start: int, stop: int) -> Path:
    """The run of a job that never meets a bad step, and skips these because its ledger says so."""
    begin(job, str(out))
    line = {"event": "skipped", "attempt": 1, "start": start, "stop": stop, "why": "loss nan", "time": 0}
    (out / "ledger.jsonl").write_text(json.dumps(line) + "\n")
    train(job, str(out), console=silent())
    return out


def test_a_bad_step_ends_the_run_and_leaves_what_it_was(job: FinetuneJob, tmp_path: Path) -> None:
    with poisoned(job, BAD), pytest.raises(DrafError, match=f"step {BAD + 1}: expected a finite loss, found nan"):
        train(job, str(tmp_path / "run"), console=silent())
    (flight,) = (tmp_path / "run" / "flight").iterdir()
    found = json.loads(flight.read_text())
    assert [step["step"] for step in found["steps"]] == list(range(1, BAD + 2))
    assert {int(uid, 16) for uid in found["steps"][-1]["uids"]} == uids_of(job, BAD)
    assert "expected a finite loss" in found["troubles"][0]["what"]
    ended = open_run(str(tmp_path / "run")).ledger()[-1]
    assert (ended["event"], ended["outcome"], ended["reason"], ended["done"]) == ("end", "failed", "DrafError", BAD)
    assert [failure["lost_steps"] for failure in ended["goodput"]["failures"]] == [BAD - ended["steps"]]


def test_a_skipped_step_leaves_everything_else_as_it_was(job: FinetuneJob, undisturbed: Path, tmp_path: Path) -> None:
    skipping = on_bad_loss(job, action="skip")
    with poisoned(job, BAD):
        train(skipping, str(tmp_path / "run"), console=silent())
    assert skipped_lines(tmp_path / "run") == [(BAD, BAD + 1)]
    before, found = losses(undisturbed), losses(tmp_path / "run")
    assert found.keys() == before.keys() - {BAD + 1}
    assert [found[step] for step in range(1, BAD + 1)] == [before[step] for step in range(1, BAD + 1)]
    assert all(math.isfinite(loss) for loss in found.values())
    assert_same(tmp_path / "run", told_to_skip(skipping, tmp_path / "told", BAD, BAD + 1))


def test_going_back_skips_what_led_to_the_bad_step(job: FinetuneJob, tmp_path: Path) -> None:
    rolling = on_bad_loss(job, action="roll_back")
    with poisoned(job, BAD):
        train(rolling, str(tmp_path / "run"), console=silent())
    assert skipped_lines(tmp_path / "run") == [(EVERY, BAD + 1)]
    assert_same(tmp_path / "run", told_to_skip(rolling, tmp_path / "told", EVERY, BAD + 1))
    (failure,) = open_run(str(tmp_path / "run")).ledger()[-1]["goodput"]["failures"]
    assert (failure["why"], failure["lost_steps"]) == ("bad loss", BAD - EVERY)
    shown = CliRunner().invoke(app, ["run", "show", str(tmp_path / "run")]).stdout
    assert "update skipped: loss nan" in shown
    assert "bad loss" in shown


@pytest.mark.parametrize("keep", [1, 9])
def test_where_a_run_was_stopped_changes_nothing_of_what_is_skipped(job: FinetuneJob, tmp_path: Path, keep: int) -> None:
    """The checkpoint of the stop holds a step that is to be skipped: it is not gone on from, and the regular one is still there."""
    kept = FinetuneJob.model_validate({**job.model_dump(), "checkpoint": {"every_steps": EVERY, "keep": keep}})
    rolling, out = on_bad_loss(kept, action="roll_back"), tmp_path / "run"
    with poisoned(job, BAD):
        with pytest.raises(InterruptedRunError, match=f"after step {BAD} of"):
            attempt(begin(rolling, str(out)).url, OneProcess(), silent(), StopAfter(BAD))
        assert open_run(str(out)).checkpoints.steps() == [EVERY, BAD]
        train(rolling, str(out), console=silent())
    assert skipped_lines(out) == [(EVERY, BAD + 1)]
    assert [line["start"] for line in open_run(str(out)).ledger() if line["event"] == "attempt"] == [0, BAD, EVERY]
    assert_same(out, told_to_skip(rolling, tmp_path / "told", EVERY, BAD + 1))


def test_a_bad_gradient_is_taken_back_and_skipped(job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm is known when the update is in the weights: the run goes back to the checkpoint, and does the others again."""
    skipping, step_of, done = on_bad_loss(job, action="skip"), TorchEngine.step, []

    def step(self: TorchEngine, learning_rate: float) -> float:
        done.append(step_of(self, learning_rate))
        return math.nan if len(done) == BAD + 1 else done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "step", step)
        train(skipping, str(tmp_path / "run"), console=silent())
    assert skipped_lines(tmp_path / "run") == [(BAD, BAD + 1)]
    assert_same(tmp_path / "run", told_to_skip(skipping, tmp_path / "told", BAD, BAD + 1))


def test_what_was_skipped_stays_skipped_after_an_interruption_and_with_other_data(job: FinetuneJob, tmp_path: Path) -> None:
    """The attempt that goes on does not meet the bad loss any more, and skips the step all the same."""
    skipping, out = on_bad_loss(job, action="skip"), tmp_path / "run"

    with poisoned(job, BAD), pytest.raises(InterruptedRunError):
        attempt(begin(skipping, str(out)).url, OneProcess(), silent(), StopAfter(BAD + 1))
    for path in (out / "checkpoints").iterdir():
        # Back to before the bad step: it is done again.
        if int(path.name.split("-")[1]) > BAD:
            for file in path.iterdir():
                file.unlink()
    train(skipping, str(out), console=silent())
    assert_same(out, told_to_skip(skipping, tmp_path / "told", BAD, BAD + 1))


def test_too_many_bad_steps_end_the_run(job: FinetuneJob, tmp_path: Path) -> None:
    with poisoned(job, 2, 3, 4), pytest.raises(DrafError, match="3. bad step in a row"):
        train(on_bad_loss(job, action="skip", at_most=2), str(tmp_path / "run"), console=silent())


@pytest.mark.parametrize("step", [1, 5, EVERY + 1])
def test_a_step_done_again_is_what_was_recorded(undisturbed: Path, job: FinetuneJob, step: int) -> None:
    found = replay(str(undisturbed), step)
    assert found.start == (step - 1) // EVERY * EVERY
    assert found.difference == 0.0
    assert found.agrees
    assert {int(row.uid, 16) for row in found.rows} == uids_of(job, step - 1)
    # Every row alone is summed in another order.
    assert sum(row.loss or 0.0 for row in found.rows) == pytest.approx(found.loss, rel=1e-4)


def test_a_bad_step_done_again_shows_its_loss(job: FinetuneJob, tmp_path: Path) -> None:
    with poisoned(job, BAD):
        train(on_bad_loss(job, action="skip"), str(tmp_path / "run"), console=silent())
        found = replay(str(tmp_path / "run"), BAD + 1)
        later = replay(str(tmp_path / "run"), BAD + 2)
    assert math.isnan(found.loss)
    assert found.recorded is None
    assert found.skipped == "loss nan"
    assert later.difference == 0.0


def test_a_step_that_the_job_does_not_have_is_refused(undisturbed: Path) -> None:
    with pytest.raises(SpecError, match="expected a step from 1 to"):
        replay(str(undisturbed), 10_000)


def test_two_runs_of_one_job_are_equal(undisturbed: Path, job: FinetuneJob, tmp_path: Path) -> None:
    train(job, str(tmp_path / "again"), console=silent())
    found = diff_runs(str(undisturbed), str(tmp_path / "again"))
    assert found.equal
    assert found.compared == len(losses(undisturbed))
    assert len(found.checkpoints) > 2
    done = CliRunner().invoke(app, ["run", "diff", str(undisturbed), str(tmp_path / "again")])
    assert done.exit_code == 0, done.output


def test_two_runs_part_at_the_step_and_in_the_tensor_that_was_changed(
    undisturbed: Path, job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight of one layer is moved after step 5: step 6 has another loss, and the checkpoint there another tensor."""
    step_of, done, changed = TorchEngine.step, [], []

    def step(self: TorchEngine, learning_rate: float) -> float:
        done.append(step_of(self, learning_rate))
        if len(done) == 5:
            name, parameter = next((name, p) for name, p in self.module.named_parameters() if p.dim() == 2)
            changed.append(name)
            with torch.no_grad():
                parameter.view(-1)[0] += 0.5
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "step", step)
        train(job, str(tmp_path / "other"), console=silent())
    found = diff_runs(str(undisturbed), str(tmp_path / "other"))
    assert not found.equal
    assert not found.job
    assert found.parted is not None
    assert (found.parted.step, found.parted.event) == (6, "step")
    assert any(each.name.startswith("terms.") for each in found.parted.differing)
    assert found.tensors is not None
    assert found.tensors.step == 6
    assert changed[0] in {each.name.split("/")[-1].removeprefix("exp_avg.") for each in found.tensors.tensors}
    done_ = CliRunner().invoke(app, ["run", "diff", str(undisturbed), str(tmp_path / "other"), "--json"])
    assert done_.exit_code == 1
    assert json.loads(done_.stdout)["parted"]["step"] == 6


def test_jobs_that_differ_are_named_by_their_keys(undisturbed: Path, job: FinetuneJob, tmp_path: Path) -> None:
    other = job.model_copy(update={"seed": 5, "epochs": 1})
    train(other, str(tmp_path / "other"), console=silent())
    found = diff_runs(str(undisturbed), str(tmp_path / "other"))
    assert {each.name for each in found.job} == {"seed", "epochs"}
    assert found.parted is not None
    assert found.parted.step == 1
    text = CliRunner().invoke(app, ["run", "diff", str(undisturbed), str(tmp_path / "other")])
    assert text.exit_code == 1
    assert "seed" in text.stdout


def test_the_command_shows_a_step_to_people_and_machines(undisturbed: Path) -> None:
    shown = CliRunner().invoke(app, ["run", "replay", str(undisturbed), "--step", "4"])
    assert shown.exit_code == 0, shown.output
    assert "bit for bit" in shown.stdout
    found = json.loads(CliRunner().invoke(app, ["run", "replay", str(undisturbed), "--step", "4", "--json"]).stdout)
    assert found["agrees"] is True
    assert found["loss"] == found["recorded"]["loss"]


def test_a_run_that_ended_in_order_leaves_no_flight(undisturbed: Path) -> None:
    assert not list((undisturbed / "flight").iterdir())
