"""The weights of the best validation: what a run that stops early keeps, and that they come back where they are lost."""

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_runs import assert_same_run, interrupt_at, run, tensors_at, validations
from rich.console import Console
from safetensors.torch import load_file
from small_runs import small_job, small_release

from draf_dist.errors import DataError, InterruptedRunError
from draf_dist.training.exporting import export_best
from draf_dist.training.job import CheckpointConfig, FinetuneJob
from draf_dist.training.run import RunResult, train
from draf_dist.training.run_folder import open_run

# A run that ended: its result and its folder.
Finished = tuple[RunResult, Path]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> FinetuneJob:
    """With a rate that spoils the weights the first epochs are the best ones."""
    job = small_job(
        small_release(tmp_path_factory.mktemp("data"), num_subjects=90, seed=1), checkpoint={"every_steps": 3, "keep": 3}
    )
    return job.model_copy(
        update={"patience": 2, "epochs": 40, "optimizer": job.optimizer.model_copy(update={"learning_rate": 0.1})}
    )


@pytest.fixture(scope="module")
def soon_spoiled(spoiled: FinetuneJob, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """That run, whole."""
    out = tmp_path_factory.mktemp("spoiled") / "run"
    return run(spoiled, out), out


def without_its_end(whole: Path, out: Path) -> None:
    """A copy, as a kill in the export would have left it."""
    shutil.copytree(whole, out)
    ledger = out / "ledger.jsonl"
    *before_end, _ = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(before_end))


@pytest.mark.parametrize("how", ["broken", "gone"])
def test_best_weights_that_are_lost_are_made_again(spoiled: FinetuneJob, soon_spoiled: Finished, tmp_path: Path, how: str) -> None:
    """Every checkpoint that is left is from after them: the run begins at step 0, and comes to the same."""
    (result, whole), out = soon_spoiled, tmp_path / "run"
    without_its_end(whole, out)
    weights = tensors_at(out, result.best_step)
    shutil.rmtree(weights.parent) if how == "gone" else weights.write_bytes(b"rot")
    assert replace(run(spoiled, out), url=result.url) == result
    assert [line["start"] for line in open_run(str(out)).ledger() if line["event"] == "attempt"] == [0, 0]
    assert_same_run(whole, out)


def test_best_weights_that_are_lost_are_missed_when_the_run_goes_on(
    spoiled: FinetuneJob, soon_spoiled: Finished, tmp_path: Path
) -> None:
    """Not only at its end; and an older checkpoint, which has another best, serves."""
    result, whole = soon_spoiled
    out, said, kept = tmp_path / "run", io.StringIO(), spoiled.model_copy(update={"checkpoint": CheckpointConfig(keep=9)})
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, result.best_step + 2)
        with pytest.raises(InterruptedRunError):
            run(kept, out)
    tensors_at(out, result.best_step).write_bytes(b"rot")
    before = max((step for step in open_run(str(out)).checkpoints.steps() if step < result.best_step), default=0)
    assert replace(train(kept, str(out), console=Console(file=said, width=1000)), url=result.url) == result
    assert f"the run goes back to before step {result.best_step}" in said.getvalue()
    starts = [line["start"] for line in open_run(str(out)).ledger() if line["event"] == "attempt"]
    assert starts == [0, before]
    assert_same_run(whole, out)


def test_best_weights_that_are_lost_at_the_export_cost_no_fresh_start(
    spoiled: FinetuneJob, soon_spoiled: Finished, tmp_path: Path
) -> None:
    from draf_dist.training import run as running

    def break_and_export(folder: Any, stage: Any, step: int) -> None:
        tensors_at(tmp_path / "run", step).write_bytes(b"rot")
        export_best(folder, stage, step)

    without_its_end(soon_spoiled[1], tmp_path / "run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(running, "export_best", break_and_export)
        with pytest.raises(DataError, match=r"expected the weights of the best validation.*The same command goes back") as caught:
            run(spoiled, tmp_path / "run")
    # That it does: see the test before.
    assert "--fresh" not in str(caught.value)


def test_training_stops_early_and_keeps_the_best(spoiled: FinetuneJob, soon_spoiled: Finished, tmp_path: Path) -> None:
    result, whole = soon_spoiled
    found = validations(whole)
    assert result.steps < 40 * found[0][0]
    assert found[-1][1] >= result.best_loss
    assert result.best_step == found[-3][0]
    exported = load_file(whole / "model" / "model.safetensors")
    best = open_run(str(whole)).checkpoints.at(result.best_step).tensors.weights()
    assert all(torch.equal(value, best[name]) for name, value in exported.items())

    # Stopped after the best epoch, the run must remember which one that was and how long ago.
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, result.best_step + 2)
        with pytest.raises(InterruptedRunError):
            run(spoiled, tmp_path / "continued")
    assert replace(run(spoiled, tmp_path / "continued"), url=result.url) == result
    assert_same_run(whole, tmp_path / "continued")
