"""`draf tune`: a campaign whose driver is killed twice, and campaigns that share pre-training, fail, stop, or have workers."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console
from small_runs import ENCODERS, small_job, small_release
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.config.spec import dump_yaml
from draf_dist.errors import DrafError, InterruptedRunError, SpecError
from draf_dist.launch.profile import RayProfile
from draf_dist.launch.ray_cluster import ray_cluster
from draf_dist.training.jobs import load_job
from draf_dist.training.run_folder import open_run
from draf_dist.tuning.campaign import CampaignResult, run_campaign
from draf_dist.tuning.campaign_job import CampaignJob, load_campaign

ALPHA, ACD = "finetune.model.reliability_alpha", "finetune.objective.lambda_acd"
SPACE = {ALPHA: {"low": 0.1, "high": 100, "log": True}, ACD: {"low": 0.01, "high": 1}}
TRIALS = 10
# Starting Ray three times takes long where other work is going on.
pytestmark = pytest.mark.timeout(900)
# Half a worker each, so that a trial's actor and two workers of another find room on two cores.
HALF = RayProfile(workers=1, cpus_per_worker=0.5)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_release(tmp_path_factory.mktemp("tune"), num_subjects=120, seed=0)


def campaign(release: str, **changes: Any) -> CampaignJob:
    tree = {"name": "sought", "base": {"finetune": small_job(release, batch_size=16, epochs=2)}, "space": SPACE}
    stopping = {"grace_epochs": 1, "reduction_factor": 2}
    return CampaignJob.model_validate({**tree, "budget": {"trials": 2}, "stopping": stopping, "concurrent": 2, **changes})


def write(folder: Path, campaign: CampaignJob) -> Path:
    path = folder / "campaign.yaml"
    dump_yaml(campaign, path)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def draf_tune(file: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "draf_dist.cli.app", "tune", str(file), "--out", str(out), "--json"]


def killed(command: list[str], when: Callable[[], bool]) -> None:
    """Starts the driver and kills it, and nothing else, at the moment."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not when():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def twice_killed(release: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A campaign's file, its folder after two kills and a third call, and what that one printed."""
    folder = tmp_path_factory.mktemp("killed")
    file, out = write(folder, campaign(release, budget={"trials": TRIALS})), folder / "out"
    command = draf_tune(file, out)
    killed(command, lambda: len(lines(out / "rungs.jsonl")) == 1)
    killed(command, lambda: len(lines(out / "trials.jsonl")) == 4)
    # What the two had written then.
    before = {name: (out / name).read_bytes() for name in ("rungs.jsonl", "trials.jsonl")}
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Nothing written before was changed.
    assert all((out / name).read_bytes().startswith(content.rpartition(b"\n")[0]) for name, content in before.items())
    return file, out, json.loads(done.stdout)


Killed = tuple[Path, Path, dict[str, Any]]


def test_a_driver_killed_twice_finishes_every_planned_trial_once(twice_killed: Killed) -> None:
    _, out, printed = twice_killed
    assert sorted(line["trial"] for line in lines(out / "trials.jsonl")) == list(range(TRIALS))
    study = optuna.load_study(study_name="sought", storage=f"sqlite:///{out}/study.db")
    assert [(trial.number, trial.state.name) for trial in study.trials] == [(number, "COMPLETE") for number in range(TRIALS)]
    assert {trial.number: trial.value for trial in study.trials} == {row["trial"]: row["objective"] for row in printed["rows"]}
    assert len(list((out / "trials").iterdir())) == TRIALS


def test_the_rung_table_goes_on_across_kills(twice_killed: Killed) -> None:
    entries = lines(twice_killed[1] / "rungs.jsonl")
    assert sorted(entry["trial"] for entry in entries if entry["rung"] == 1) == list(range(TRIALS))
    for place, entry in enumerate(entries):
        # Every decision follows from the entries before it, whichever driver wrote them.
        values = sorted(other["value"] for other in entries[:place])
        middle = (values[(place - 1) // 2] + values[place // 2]) / 2 if values else None
        assert entry["cutoff"] == pytest.approx(middle)
        assert entry["stopped"] == (middle is not None and entry["value"] > middle)


def test_a_stopped_trial_has_done_no_epoch_more(twice_killed: Killed) -> None:
    _, out, _ = twice_killed
    for line in lines(out / "trials.jsonl"):
        epochs = [each["epoch"] for each in lines(out / "trials" / line["run"] / "metrics.jsonl") if each["event"] == "epoch"]
        assert epochs == list(range(1, line["epochs"] + 1))
        assert line["epochs"] == (1 if line["state"] == "stopped" else 2)


def test_a_trial_costs_little_beyond_training(twice_killed: Killed) -> None:
    found = lines(twice_killed[1] / "trials.jsonl")
    overhead = sorted(line["overhead_s"] for line in found)
    # wall_s - overhead_s is what the ledger of the run holds of this attempt.
    assert all(0 <= line["wall_s"] - line["overhead_s"] <= line["training_s"] + 0.01 for line in found)
    assert overhead[len(overhead) // 2] < 5


def test_a_finished_campaign_gives_its_result_again(twice_killed: Killed) -> None:
    file, out, printed = twice_killed
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = CliRunner().invoke(app, ["tune", str(file), "--out", str(out), "--json"])
    assert again.exit_code == 0
    assert json.loads(again.stdout) == printed
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(SpecError, match=r"seed: expected 0 as before, found 1"):
        run_campaign(load_campaign(file, ["seed=1"]), str(out))


def test_the_winner_is_a_job_that_train_takes(twice_killed: Killed, release: str) -> None:
    _, out, printed = twice_killed
    winner = load_job(out / "winner.yaml")
    best = printed["best"]
    assert (winner.model.reliability_alpha, winner.objective.lambda_acd) == (best["parameters"][ALPHA], best["parameters"][ACD])
    shown = CliRunner().invoke(app, ["train", str(out / "winner.yaml"), "--out", str(out / "trials" / best["run"]), "--json"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["best_loss"] == best["nll"]


def test_the_report_needs_no_network(twice_killed: Killed) -> None:
    text = (twice_killed[1] / "report.html").read_text()
    assert text.count("Plotly=(()") <= 1 < text.count("Plotly.newPlot(") <= 7
    head, _, body = text.partition("</head>")
    assert "<script src" not in head
    assert "http" not in body.replace("http://www.w3.org", "")
    for title in ("History", "By epoch", "Importance", "Slices", "Parallel coordinates", "Contours"):
        assert f"<h2>{title}</h2>" in body
    assert len(list((twice_killed[1] / "hparams").glob("trial-*/events*"))) == TRIALS


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster for the campaigns of this process."""
    with ray_cluster(HALF):
        yield


def run(release: str, out: Path | str, profile: Any = HALF, **changes: Any) -> tuple[CampaignResult, str]:
    said = io.StringIO()
    return run_campaign(campaign(release, **changes), str(out), profile, Console(file=said, width=200)), said.getvalue()


@pytest.mark.usefixtures("cluster")
def test_trials_at_the_same_time_share_one_pretraining(release: str, tmp_path: Path) -> None:
    objective = {"kind": "masked_values", "modality": "vitals"}
    pretrain = {"name": "pre", "release": release, "objective": objective, "encoder": ENCODERS["series"], "width": 8, "epochs": 1}
    base = {"finetune": small_job(release, batch_size=16, epochs=1), "pretrain": pretrain}
    result, said = run(release, tmp_path / "c", base=base)
    (pre,) = (tmp_path / "c" / "trials").glob("pre-*")
    assert [line["event"] for line in open_run(str(pre)).ledger()].count("attempt") == 1
    assert load_job(tmp_path / "c" / "winner.yaml").pretrained["vitals"].startswith(f"{pre}@")
    assert result.leaderboard.finished == 2
    assert [line.split(":")[0] for line in said.splitlines()] == ["1 of 2", "2 of 2"]


@pytest.mark.usefixtures("cluster")
def test_a_failed_trial_is_named_and_the_others_go_on_until_too_many_fail(release: str, s3: Any) -> None:
    """In a bucket, so that the second call goes on from the study that the first one has sent there."""
    space = {"finetune.optimizer.learning_rate": {"choices": [1e-3, 1e30]}}
    out, changes = f"{s3.url}/campaign", {"space": space, "budget": {"trials": 3}, "concurrent": 1, "stopping": None, "seed": 1}
    with pytest.raises(DrafError, match="expected at most 0 failed trials, found 1"):
        run(release, out, **changes, max_failures=0)
    result, said = run(release, out, **changes, max_failures=4)
    board = result.leaderboard
    assert sorted((row.trial, row.state) for row in board.rows) == [(0, "finished"), (1, "failed"), (2, "failed")]
    assert all("learning_rate" in row.reason for row in board.rows if row.state == "failed")
    assert "learning_rate" in said
    assert open_run(f"{out}/trials/{board.best.run}").end()["best_loss"] == board.best.nll


@pytest.mark.usefixtures("cluster")
def test_a_stopped_campaign_leaves_checkpoints_and_goes_on(release: str, tmp_path: Path) -> None:
    base = {"finetune": small_job(release, batch_size=4, epochs=40, patience=40)}
    changes = {"base": base, "budget": {"trials": 1}, "stopping": None}

    def interrupt() -> None:
        while not list((tmp_path / "c" / "trials").glob("*/checkpoints/step-*/manifest.json")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(InterruptedRunError, match="SIGINT after 0 of 1 trials"):
        run(release, tmp_path / "c", **changes)
    (folder,) = (tmp_path / "c" / "trials").iterdir()
    ended = open_run(str(folder)).ledger()[-1]
    assert (ended["event"], ended["outcome"]) == ("end", "interrupted")
    # Its parameters are kept: it is this run that would be continued.
    study = optuna.load_study(study_name="sought", storage=f"sqlite:///{tmp_path / 'c'}/study.db")
    assert [trial.state.name for trial in study.trials] == ["RUNNING"]
    assert open_run(str(folder)).job.model.reliability_alpha == study.trials[0].params[ALPHA]


@pytest.mark.usefixtures("cluster")
def test_a_trial_of_two_workers_trains_on_workers_of_its_own(release: str, tmp_path: Path) -> None:
    two = RayProfile(workers=2, cpus_per_worker=0.5)
    result, _ = run(release, tmp_path / "c", two, budget={"trials": 1}, stopping=None)
    ledger = open_run(f"{result.url}/trials/{result.best.run}").ledger()
    assert {line["world"] for line in ledger if line["event"] == "attempt"} == {2}
    assert (result.best.state, result.best.epochs) == ("finished", 2)
