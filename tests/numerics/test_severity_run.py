"""Runs fit the severity and the cross-modal score before their first step, and carry them with the weights."""

from pathlib import Path

import pytest
import torch
from small_runs import silent, small_job, small_model, small_release
from torch import Tensor

from draf_dist.data.release import open_release
from draf_dist.models.export import load_model
from draf_dist.training.finetune import build_finetuning
from draf_dist.training.job import FinetuneJob
from draf_dist.training.pin import pin
from draf_dist.training.run import train

CPU = torch.device("cpu")
FITTED = ("severity.", "cross_modal.")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_release(tmp_path_factory.mktemp("one"), num_subjects=80, seed=1)


@pytest.fixture(scope="module")
def finished(release: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "gated"
    train(gated_job(release), str(out), console=silent())
    return out


def gated_job(release: str, kind: str = "severity_cross_modal_gate", **changes: object) -> FinetuneJob:
    inner = small_model("draf", alpha_mode="scaled")
    return small_job(release, model={"kind": kind, "fusion": inner}, **{"epochs": 1, **changes})


def fitted_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith(FITTED)}


def test_a_run_fits_before_its_first_step_and_its_model_carries_what_was_fitted(finished: Path, release: str) -> None:
    begun = build_finetuning(gated_job(release), open_release(release), CPU).model.state_dict()
    exported = load_model(finished / "model").model.state_dict()
    before, after = fitted_of(begun), fitted_of(exported)
    assert before.keys() == after.keys()
    # Frozen: an epoch of training has moved none of it. And fitted twice: it is a function of the job and the release.
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for name in ("cxr", "vitals", "labs"):
        severities = after[f"severity.tables.m_{name}.severities"]
        assert severities[0] == 0
        assert severities[-1] > 0
    assert after["cross_modal.slope"].all()
    assert exported["fusion.weights.u_scale"] != 1
    assert exported["gate.offsets"].any()


def test_a_run_that_goes_on_from_another_keeps_what_that_was_fitted_on(finished: Path, tmp_path: Path) -> None:
    other = small_release(tmp_path, num_subjects=60, seed=2)
    job = pin(gated_job(other, warm_start=str(finished)))
    assert isinstance(job, FinetuneJob)
    started = build_finetuning(job, open_release(job.release), CPU).model.state_dict()
    expected = load_model(finished / "model").model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in started.items())


def test_rejection_is_trained_and_exported_likewise(release: str, tmp_path: Path) -> None:
    train(gated_job(release, "severity_rejection"), str(tmp_path / "run"), console=silent())
    exported = load_model(tmp_path / "run" / "model")
    assert exported.model.state_dict()["severity.tables.m_vitals.severities"][-1] > 0
    assert exported.config.kind == "severity_rejection"
