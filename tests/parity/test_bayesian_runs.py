"""A run of the Bayesian stage with DeepSpeed, on any number of ranks and after any stop, is that of one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import run_on_ranks
from outlined_balls import outlined_release
from small_runs import silent, small_job
from stop_after import StopAfter

from draf_dist.errors import InterruptedRunError
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.job import FinetuneJob
from draf_dist.training.run import attempt, begin, train

OBJECTIVE = {"kind": "bayesian", "estimator": "weights", "adversarial": {"attack": "fgsm", "samples": 1, "epsilon": 0.02}}
UNET = {"kind": "bayesian_unet", "widths": [4, 6], "groups": 2}
GOES_ON = 999


def run_rank(rank: int, world: int, url: str, steps: int, stage: int) -> None:
    """One process: carries the run on, up to so many steps. Only the last rank hears that it is to stop."""
    from draf_dist.training import deepspeed_engine

    # Every parameter is cut up at stage 3, however small.
    deepspeed_engine.WHOLE_BELOW = 0
    config = DeepSpeedConfig.model_validate({"zero_stage": stage})
    backend = deepspeed_engine.DeepSpeedRanks(config, torch.device("cpu"))
    stop = StopAfter(steps if rank == world - 1 else GOES_ON)
    if steps == GOES_ON:
        assert attempt(url, backend, silent(), stop).finished
    else:
        with pytest.raises(InterruptedRunError):
            attempt(url, backend, silent(), stop)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> FinetuneJob:
    release = outlined_release(tmp_path_factory.mktemp("data"))
    # With decay, so that what has it and what has not lies in groups of its own.
    optimizer = {"learning_rate": 0.003, "weight_decay": 0.1}
    options = {"objective": OBJECTIVE, "optimizer": optimizer, "batch_size": 6, "checkpoint": {"every_steps": 2}, "epochs": 2}
    return small_job(release, model=UNET, **options)


@pytest.fixture(scope="module")
def alone(job: FinetuneJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    train(job, str(out), console=silent())
    return out


def numbers(out: Path, event: str, *names: str) -> list[list[Any]]:
    found = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return [[line[name] for name in names] for line in found if line["event"] == event]


def assert_near(found: Path, expected: Path) -> None:
    for event, names in (("step", ("loss", "gradient_norm")), ("epoch", ("nll", "dice", "error_auroc"))):
        pairs = zip(numbers(found, event, *names), numbers(expected, event, *names), strict=True)
        for left, right in pairs:
            # What is attacked may differ in a voxel whose gradient is as good as 0.
            assert left == pytest.approx(right, rel=1e-4), event


def test_one_rank_of_deepspeed_is_the_run_of_one_process(job: FinetuneJob, alone: Path, tmp_path: Path) -> None:
    folder = begin(job, str(tmp_path / "run"))
    run_on_ranks(run_rank, 1, folder.url, GOES_ON, 2)
    assert_near(tmp_path / "run", alone)


def test_a_run_that_goes_on_with_other_ranks_and_another_stage_is_the_same(job: FinetuneJob, alone: Path, tmp_path: Path) -> None:
    """Its validation streams passes through a model that ZeRO 3 has cut up."""
    folder = begin(job, str(tmp_path / "run"))
    run_on_ranks(run_rank, 2, folder.url, 6, 3)
    done = len(numbers(tmp_path / "run", "step"))
    assert 3 <= done < len(numbers(alone, "step"))
    assert len(numbers(tmp_path / "run", "epoch")) == 1
    run_on_ranks(run_rank, 2, folder.url, GOES_ON, 1)
    assert_near(tmp_path / "run", alone)
