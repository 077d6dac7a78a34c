"""Small runs of one process, stopped at a step, and what makes two of them the same run."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import silent

from draf_dist.protocols.names import checkpoint_folder, tensors_file
from draf_dist.storage import open_store
from draf_dist.training.job import FinetuneJob
from draf_dist.training.journal import read_lines
from draf_dist.training.run import RunResult, train
from draf_dist.training.run_folder import open_run


def run(job: FinetuneJob, out: Path, **options: Any) -> RunResult:
    return train(job, str(out), console=silent(), **options)


def losses(out: Path) -> list[tuple[int, float]]:
    lines = read_lines(open_store(str(out)), "metrics.jsonl")
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]


def validations(out: Path) -> list[tuple[int, float]]:
    lines = read_lines(open_store(str(out)), "metrics.jsonl")
    return [(line["step"], line["nll"]) for line in lines if line["event"] == "epoch"]


def last_weights(out: Path) -> dict[str, torch.Tensor]:
    checkpoints = open_run(str(out)).checkpoints
    return dict(checkpoints.at(checkpoints.steps()[-1]).tensors)


def tensors_at(out: Path, step: int) -> Path:
    """The file of the only rank in the checkpoint of a step."""
    checkpoints = open_run(str(out)).checkpoints
    (found,) = (each for each in checkpoints.ids() if f"step-{step:08d}-" in each)
    return out / checkpoint_folder(found) / tensors_file(0)


def assert_same_run(left: Path, right: Path) -> None:
    assert losses(left) == losses(right)
    assert validations(left) == validations(right)
    a, b = last_weights(left), last_weights(right)
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert (left / "model" / "model.safetensors").read_bytes() == (right / "model" / "model.safetensors").read_bytes()


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends this process a real SIGTERM once a step has been recorded."""
    from draf_dist.training.tracking import Tracker

    record = Tracker.step

    def recorded(self: Tracker, report: Any, supply: Any) -> None:
        record(self, report, supply)
        if report.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tracker, "step", recorded)
