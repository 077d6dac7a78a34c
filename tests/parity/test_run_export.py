"""`draf run export`: the model of any checkpoint of a run, also of one that is not finished and that many ranks saved."""

import json
from pathlib import Path

import pytest
import torch
from forked_ranks import run_on_ranks
from small_runs import silent, small_job, small_release
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.errors import InterruptedRunError, SpecError
from draf_dist.models.export import load_model
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.exporting import export_checkpoint
from draf_dist.training.run import attempt, begin
from draf_dist.training.run_folder import open_run

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
        export_checkpoint(stopped, 7, str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()
