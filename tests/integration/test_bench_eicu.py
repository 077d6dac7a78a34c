"""`draf bench` on the public eICU demo, at a tiny setting; docs/results.md has the real one. Data are no part of the repository."""

from pathlib import Path

import public_data
import pytest
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.evaluation.bench_results import Bench

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "folds=2",
    "systems={mean: {}}",
    "baselines=[{kind: logistic_regression, inverse_penalties: [3e-3, 1e-2]}]",
    "reference=mean",
    "finetune.epochs=1",
    "finetune.passes_train=1",
    "finetune.passes_eval=2",
    "passes=2",
    "bootstrap=50",
)


def test_two_folds_of_real_hospitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = public_data.folder("eicu_demo")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DRAF_SUBJECT_KEY", "sixteen or more bytes of key")
    command = ["bench", "jobs/bench_eicu.yaml", "--raw", str(raw), "--out", str(tmp_path), "--executor", "serial"]
    for setting in TINY:
        command += ["--set", setting]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = Bench.model_validate_json((tmp_path / "bench.json").read_text())
    assert (found.about.num_studies, found.about.num_subjects, found.about.num_sites) == (2289, 1751, 186)
    assert sum(found.about.class_counts) == 2289
    mean, regression = found.rows
    # Known from other folds: .81. Far above it, something would leak: APACHE IVa's own prediction has .86.
    assert 0.77 < regression.metrics["auroc"].value < 0.86
    assert mean.metrics["auroc"].value > 0.6
    assert regression.differences["auroc"].low < regression.differences["auroc"].high


def test_the_zoo_disturbs_the_fold_in_every_way_of_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = public_data.folder("eicu_demo")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DRAF_SUBJECT_KEY", "sixteen or more bytes of key")
    command = ["bench", "jobs/bench_zoo_eicu.yaml", "--raw", str(raw), "--out", str(tmp_path), "--executor", "serial"]
    zoo = "systems={mean: {model: {kind: mean, width: 8}}, severity_rejection: {model: {kind: severity_rejection}}}"
    for setting in (*TINY, zoo, "seeds=[0]"):
        command += ["--set", setting]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = Bench.model_validate_json((tmp_path / "bench.json").read_text())
    assert [condition.name for condition in found.conditions] == ["clean", "sigma_10", "half_sigma_3", "swap", "mcar_50", "mnar_30"]
    regression = {condition.name: condition.rows[2].metrics["auroc"].value for condition in found.conditions}
    # Nothing that was done to the fold helps, and what is left still says something.
    assert all(0.5 < value < regression["clean"] for name, value in regression.items() if name != "clean"), regression
