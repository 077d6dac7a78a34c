"""An uncertainty that is a risk score by another name is noticed in validation, told at the end, and shown with the run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import silent, small_job, small_release
from torch import nn

from draf_dist.metrics.rank import spearman
from draf_dist.schema.batch import Batch, ClassTarget, FusionOutput, MultiLabelTarget, SurvivalTarget, Target
from draf_dist.training.risk_correlation import PREFIX, risk_columns, risk_correlations, risk_warnings
from draf_dist.training.run import train
from draf_dist.training.run_folder import open_run
from draf_dist.training.summary import summarise

ROWS = 40


def batch_of(target: Target) -> Batch:
    rows = torch.arange(ROWS)
    present = torch.ones(ROWS, 2, dtype=torch.bool)
    present[::4, 1] = False
    nothing = torch.zeros(ROWS, 2)
    flags = torch.zeros(ROWS, 2, dtype=torch.bool)
    weight = (rows < ROWS - 3).float()
    return Batch(("a", "b"), {}, present, flags, nothing, nothing, flags, target, rows, rows, rows, weight)


def output_of(logits: torch.Tensor, uncertainty: dict[str, torch.Tensor], own: torch.Tensor | None = None) -> FusionOutput:
    return FusionOutput(logits, torch.zeros(ROWS, 2), uncertainty, torch.zeros(ROWS, 2, 1), modality_logits=own)


KNOWN = torch.ones(ROWS, dtype=torch.bool)
CLASSES = ClassTarget(torch.zeros(ROWS, dtype=torch.int64), KNOWN)
LABELS = MultiLabelTarget(torch.zeros(ROWS, 3, dtype=torch.bool), torch.ones(ROWS, 3, dtype=torch.bool))
TIMES = SurvivalTarget(torch.ones(ROWS), KNOWN, torch.zeros(ROWS, dtype=torch.int64), KNOWN)


@pytest.mark.parametrize(("target", "outputs"), [(CLASSES, 2), (LABELS, 3), (TIMES, 4)])
def test_it_is_the_rank_correlation_with_what_the_modality_fears(target: Target, outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(5, ROWS, 2, outputs, generator=generator)
    probability = (own.softmax(-1) if target is CLASSES else own.sigmoid()).mean(0).double().numpy()
    fears = {
        ClassTarget: lambda p: p[..., 1],
        MultiLabelTarget: lambda p: p.mean(-1),
        SurvivalTarget: lambda p: -np.cumprod(1 - p, -1).sum(-1),
    }[type(target)](probability)
    uncertainty = torch.rand(ROWS, 2, generator=generator)
    batch = batch_of(target)
    found = risk_correlations(*risk_arrays(output_of(torch.randn(5, ROWS, outputs), {"used": uncertainty}, own), batch), ("a", "b"))
    counted = batch.weight.numpy() > 0
    for m, name in enumerate(batch.modalities):
        here = counted & batch.present[:, m].numpy()
        assert found[f"{PREFIX}{name}"] == pytest.approx(spearman(uncertainty[here, m].double().numpy(), fears[here, m]), abs=1e-6)


def risk_arrays(output: FusionOutput, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    uncertainty, risk = risk_columns(output, batch)
    return uncertainty.numpy(), risk.numpy()


def test_without_heads_of_its_own_the_fused_risk_counts_and_without_u_there_is_nothing() -> None:
    logits, batch = torch.randn(1, ROWS, 2), batch_of(CLASSES)
    risk = logits.softmax(-1)[0, :, 1]
    found = risk_correlations(*risk_arrays(output_of(logits, {"epistemic": risk[:, None].expand(-1, 2)}), batch), ("a", "b"))
    assert found == pytest.approx({"risk_correlation/a": 1.0, "risk_correlation/b": 1.0})
    nothing = risk_correlations(*risk_arrays(output_of(logits, {}), batch), ("a", "b"))
    assert np.isnan(list(nothing.values())).all()
    many = torch.randn(1, ROWS, 3)
    classes = risk_correlations(*risk_arrays(output_of(many, {"used": torch.rand(ROWS, 2)}), batch), ("a", "b"))
    assert np.isnan(list(classes.values())).all()


def test_only_what_is_above_the_limit_is_told_and_only_of_the_best_step() -> None:
    lines = [
        {"event": "step", "step": 4, "loss": 1.0},
        {"event": "epoch", "step": 2, "nll": 1.0, "risk_correlation/cxr": 0.99},
        {"event": "epoch", "step": 4, "nll": 0.5, "risk_correlation/cxr": 0.69, "risk_correlation/labs": -0.8},
    ]
    (told,) = risk_warnings(lines, 4)
    assert told.startswith("Modality labs")
    assert "where it sees no risk" in told
    assert risk_warnings(lines, None) == ()


class _Fearful(nn.Module):
    """Says of every modality that it is as uncertain as it is afraid."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, keys: torch.Tensor) -> FusionOutput:
        output: FusionOutput = self.model(batch, keys)
        assert output.modality_logits is not None
        risk = output.modality_logits.softmax(-1).mean(0)[..., 1]
        return FusionOutput(**{**vars(output), "uncertainty": {"used": torch.where(batch.present, risk, 0.0)}})


def test_a_planted_risk_score_is_told_at_the_end_and_shown_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from draf_dist.training import validate

    plain = validate._columns  # noqa: SLF001
    monkeypatch.setattr(validate, "_columns", lambda module, batch, passes: plain(_Fearful(module), batch, passes))
    release = small_release(tmp_path, num_subjects=240, seed=1)
    console = silent()
    with console.capture() as told:
        train(small_job(release, epochs=1), str(tmp_path / "run"), console=console)
    last = [line for line in open_run(str(tmp_path / "run")).metrics() if line["event"] == "epoch"][-1]
    summary = summarise(str(tmp_path / "run"))
    assert last["risk_correlation/labs"] > 0.99
    assert any(text.startswith("Modality labs: its uncertainty goes with its risk (Spearman +1.00") for text in summary.warnings)
    assert "warning: Modality labs: its uncertainty goes with its risk" in told.get()
    assert "risk_correlation" not in told.get()
