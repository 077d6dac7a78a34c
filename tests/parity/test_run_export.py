"""`draf run export`: the model of any checkpoint of a run, also of one that is not finished and that many ranks saved."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked_ranks import run_on_ranks
from small_runs import silent, small_job, small_release
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.errors import DataError, InterruptedRunError, SpecError
from draf_dist.launch.local_s3 import LocalS3
from draf_dist.models.export import load_model
from draf_dist.storage import open_store
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.exporting import export_checkpoint
from draf_dist.training.run import attempt, begin
from draf_dist.training.run_folder import open_run
from draf_dist.training.torch_engine import OneProcess

OFFLOADED = DeepSpeedConfig(zero_stage=3, offload="optimizer_and_parameters", activation_checkpointing=True)


class StopAtOnce:
    """Asks to stop after the first step."""

    requested = "SIGTERM"


def run_rank(rank: int, world: int, url: str) -> None:
    with pytest.raises(InterruptedRunError):
        attempt(url, DeepSpeedRanks(OFFLOADED, torch.device("cpu")), silent(), StopAtOnce())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run whose only checkpoint is that of step 1, by two ranks with ZeRO 3 and everything offloaded."""
    folder = tmp_path_factory.mktemp("run")
    job = small_job(small_release(folder, num_subjects=40, seed=1))
    url = begin(job, str(folder / "run")).url
    run_on_ranks(run_rank, 2, url)
    return url


def test_the_model_of_a_run_in_its_middle_holds_the_bits_of_its_checkpoint(stopped: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["run", "export", stopped, "--out", str(tmp_path / "model"), "--json"])
    assert json.loads(done.output)["step"] == 1
    assert open_run(stopped).end() is None
    read = load_model(tmp_path / "model").model.state_dict()
    held = open_run(stopped).checkpoints.at(1).tensors.weights()
    assert read.keys() == held.keys()
    assert all(torch.equal(value, held[name]) for name, value in read.items())


def test_a_step_without_a_checkpoint_is_answered_with_those_there_are(stopped: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="expected a checkpoint at step 7, found some at 1"):
        export_checkpoint(stopped, 7, str(tmp_path / "model"), pytest.fail)
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def broken(stopped: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same run one step later, whose newest checkpoint has lost half of its weights."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    shutil.copytree(stopped, folder)
    with pytest.raises(InterruptedRunError):
        attempt(str(folder), OneProcess(), silent(), StopAtOnce())
    (tensors,) = folder.glob("checkpoints/step-00000002-*/rank-*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
    return str(folder)


def test_the_newest_is_the_newest_good_one_and_the_broken_one_is_named(broken: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["run", "export", broken, "--out", str(tmp_path / "model"), "--json"])
    assert (done.exit_code, json.loads(done.stdout)["step"]) == (0, 1)
    assert "warning: " in done.stderr
    assert "step-00000002" in done.stderr
    weights = load_model(tmp_path / "model").model.state_dict()
    held = open_run(broken).checkpoints.at(1).tensors.weights()
    assert all(torch.equal(value, held[name]) for name, value in weights.items())


def test_a_step_whose_checkpoint_is_broken_is_answered_with_the_others(broken: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a good checkpoint at step 2.*There are others at 1\."):
        export_checkpoint(broken, 2, str(tmp_path / "model"), pytest.fail)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("place", ["", "model", "exports/first", "checkpoints/../model"])
def test_no_run_is_written_into(stopped: str, place: str) -> None:
    before = sorted(Path(stopped).rglob("*"))
    with pytest.raises(SpecError, match="expected a folder in no run folder"):
        export_checkpoint(stopped, None, f"{stopped}/{place}", pytest.fail)
    assert sorted(Path(stopped).rglob("*")) == before


def test_neither_is_one_that_is_reached_by_a_link(stopped: str, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(stopped)
    with pytest.raises(SpecError, match="a run, above it"):
        export_checkpoint(stopped, None, str(tmp_path / "latest" / "model"), pytest.fail)


def test_beside_a_run_and_below_a_job_of_ones_own_is_free(stopped: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: mine\n")
    assert export_checkpoint(stopped, None, str(tmp_path / "model"), pytest.fail).step == 1
    beside = f"{stopped}/../model-of-run"
    assert set(export_checkpoint(stopped, None, beside, pytest.fail).files) == {each.name for each in Path(beside).iterdir()}


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with LocalS3(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server.create_bucket("exports")


def test_a_run_in_a_bucket_is_not_written_into_either(bucket: str, stopped: str) -> None:
    run = open_store(f"{bucket}/runs/first")
    for name in ("job.yaml", "ledger.jsonl"):
        run.write(name, (Path(stopped) / name).read_bytes())
    for out in (run.url, f"{run.url}/model"):
        with pytest.raises(SpecError, match="expected a folder in no run folder"):
            export_checkpoint(stopped, None, out, pytest.fail)
    assert export_checkpoint(stopped, None, f"{bucket}/exports", pytest.fail).step == 1
