"""Every engine on one device gives the losses of plain torch on the CPU: DRAF, plain mean, SimCLR; ZeRO 1-3; fp32 and bf16.

The same runs on the CPU, always, and on a GPU where there is one (marked gpu).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import CONTINUED, MODELS, SAVED, STAGES, STEPS

FP32 = ("torch", *(f"zero{stage}" for stage in STAGES), "zero2 in two parts")
BF16 = tuple(f"zero{stage} bf16" for stage in STAGES)
# Relative, of five losses. On a GPU other kernels add in another order.
LOSS_TOLERANCE = {"cpu": 2e-6, "cuda": 1e-4}
# 8 bits of mantissa, five steps; tau 0.1 makes ten times as much of it.
BF16_TOLERANCE = {"draf": 5e-3, "mean": 5e-3, "simclr": 0.05}
# Some kernels of a GPU have no deterministic form (training/repeatable.py); on the CPU all have.
RESUME_TOLERANCE = {"cpu": 0.0, "cuda": 1e-5}

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(device: str, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What engine_runs.py saw on the device."""
    out = tmp_path_factory.mktemp(device)
    here = Path(__file__).parent
    environment = os.environ | {"DS_ACCELERATOR": device, "PYTHONPATH": str(here.parent), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, str(here / "engine_runs.py"), device, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read: Found = json.loads((out / "found.json").read_text())
    return read


@pytest.mark.parametrize("engine", FP32)
@pytest.mark.parametrize("model", MODELS)
def test_fp32_gives_the_losses_of_plain_torch_on_the_cpu(device: str, found: Found, model: str, engine: str) -> None:
    expected = found[f"{model} oracle"]["losses"]
    assert len(set(expected)) == STEPS
    assert found[f"{model} {engine}"]["losses"] == pytest.approx(expected, rel=LOSS_TOLERANCE[device])


@pytest.mark.parametrize("engine", BF16)
@pytest.mark.parametrize("model", MODELS)
def test_bf16_stays_near_fp32_and_is_not_fp32(found: Found, model: str, engine: str) -> None:
    expected, rounded = found[f"{model} oracle"]["losses"], found[f"{model} {engine}"]["losses"]
    assert rounded == pytest.approx(expected, rel=BF16_TOLERANCE[model])
    assert rounded != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("engine", FP32 + BF16)
@pytest.mark.parametrize("model", CONTINUED)
def test_a_continued_run_goes_on_as_the_undisturbed_one(device: str, found: Found, model: str, engine: str) -> None:
    run = found[f"{model} {engine}"]
    assert run["continued"] == pytest.approx(run["losses"][SAVED:], rel=RESUME_TOLERANCE[device], abs=0)


@pytest.mark.parametrize("engine", FP32)
def test_what_plain_torch_began_on_the_cpu_is_continued(device: str, found: Found, engine: str) -> None:
    expected = found["draf oracle"]["losses"][SAVED:]
    assert found[f"draf {engine}"]["from_cpu"] == pytest.approx(expected, rel=LOSS_TOLERANCE[device])


@pytest.mark.parametrize("model", MODELS)
def test_parameters_activations_and_moments_live_on_the_device(device: str, found: Found, model: str) -> None:
    for engine in FP32 + BF16:
        assert found[f"{model} {engine}"]["homes"] == [device]
