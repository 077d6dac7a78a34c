"""A planted risk in a wide table: found again from a packed export, at a hospital that was never trained on."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import SUBJECT_KEY, silent
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.config.spec import read_yaml, validate_spec
from draf_dist.data.loader import evaluation_batches
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release, open_release
from draf_dist.errors import SpecError
from draf_dist.evaluation.answers import TimeAnswers
from draf_dist.evaluation.bench_results import Bench
from draf_dist.evaluation.cox_baseline import CoxBaseline
from draf_dist.evaluation.cox_regression import CoxRegressionConfig
from draf_dist.evaluation.predict import check_coverage
from draf_dist.evaluation.predictions import Applied
from draf_dist.evaluation.subject import open_subject
from draf_dist.metrics.survival import concordance_index, risk, survival_negative_log_likelihood
from draf_dist.schema.batch import SurvivalTarget
from draf_dist.sources.card import load_card
from draf_dist.training.job import FinetuneJob
from draf_dist.training.run import train
from draf_dist.training.validate import evaluation_keys

ROOT = Path(__file__).resolve().parents[2]
PATIENTS, GENES, CARRY = 700, 60, 6
HELD_OUT = ("AA", "AB")
SITES = (*HELD_OUT, "B1", "B2", "C1", "C2", "02", "05")


def card() -> str:
    """That of TCGA's bladder cancers, with other sites and a few of them held out."""
    tree = read_yaml(ROOT / "datasets" / "tcga_blca.yaml")
    tree["sites"]["groups"] = {site: site for site in SITES}
    tree["split"] = {"held_out_sites": list(HELD_OUT), "public_subject_key": True}
    return json.dumps(tree)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six of 60 genes, and age, carry the risk; a patient in three has two slides, and a third of all is censored."""
    folder = tmp_path_factory.mktemp("planted")
    generator = np.random.default_rng(11)
    genes = generator.normal(size=(PATIENTS, GENES))
    age, cnv = generator.uniform(40, 90, PATIENTS), generator.integers(-2, 3, (PATIENTS, 10))
    log_risk = genes[:, :CARRY] @ np.full(CARRY, 1.0) + 0.03 * (age - 65)
    death, leaves = generator.exponential(24 * np.exp(-log_risk)), generator.exponential(60, PATIENTS)
    months, censored = np.minimum(death, leaves), (leaves < death).astype(int)
    names = [*(f"G{i}_rnaseq" for i in range(GENES)), *(f"G{i}_cnv" for i in range(10))]
    lines = [",".join(["", "case_id", "slide_id", "age", "is_female", "survival_months", "censorship", *names])]
    for i in range(PATIENTS):
        case = f"TCGA-{SITES[i % len(SITES)]}-{i:04d}"
        values = [f"{value:.4f}" for value in genes[i]] + [str(value) for value in cnv[i]]
        for slide in range(1 + (i % 3 == 0)):
            cells = [i, case, f"{case}-{slide}", f"{age[i]:.1f}", i % 2, f"{months[i] + 0.01:.4f}", censored[i], *values]
            lines.append(",".join(map(str, cells)))
    (folder / "datasets_csv_sig").mkdir()
    with zipfile.ZipFile(folder / "datasets_csv_sig" / "tcga_blca_all_clean.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../dataset_csv/tcga_blca_all_clean.csv.zip", "\n".join(lines) + "\n")
    (folder / "card.yaml").write_text(card())
    return folder


@pytest.fixture(scope="module")
def release(export: Path) -> Release:
    source = load_card(export / "card.yaml").build(export)
    return open_release(prepare(source, str(export / "release"), subject_key=SUBJECT_KEY).url)


def test_the_shipped_job_finds_a_planted_risk_at_hospitals_never_trained_on(release: Release, tmp_path: Path) -> None:
    tree = read_yaml(ROOT / "jobs" / "finetune_tcga.yaml")
    changed = {"release": release.pinned_url, "epochs": 20, "passes_eval": 5, "model": {**tree["model"], "kind": "mean"}}
    job = validate_spec({**tree, **changed}, FinetuneJob, where="job")
    subject = open_subject(train(job, str(tmp_path / "run"), console=silent()).url, None)
    hazards, times, events = [], [], []
    for batch in map(subject.normaliser, evaluation_batches(release, "ood", 64)):
        assert isinstance(batch.target, SurvivalTarget)
        with torch.no_grad():
            logits = subject.exported.model(batch, evaluation_keys(batch, 5)).logits
        hazards.append(logits.double().sigmoid().mean(0).numpy())
        times.append(batch.target.time.double().numpy())
        events.append(batch.target.event.numpy())
    time, event = np.concatenate(times), np.concatenate(events)
    assert len(time) == len(held_out_subjects(release)) == 2 * -(-PATIENTS // len(SITES)), "a patient is a study"
    assert 0.55 < event.mean() < 0.8
    assert concordance_index(time, event, risk(np.concatenate(hazards))) > 0.7


@pytest.mark.parametrize(
    ("modalities", "low", "high"), [((), 0.75, 1), (("rna",), 0.75, 1), (("clinical",), 0.5, 0.65), (("cnv",), 0.3, 0.6)]
)
def test_cox_finds_it_where_it_lies(release: Release, modalities: tuple[str, ...], low: float, high: float) -> None:
    model = CoxBaseline(CoxRegressionConfig(modalities=modalities), release, 64)
    found = model.predict(map(model.normaliser, evaluation_batches(release, "ood", 64)), "ood", Applied())
    check_coverage(found, release.manifest.receipts["ood"])
    assert isinstance(found.answers, TimeAnswers)
    time, event = found.answers.time.astype(np.float64), found.answers.event
    assert low < concordance_index(time, event, found.risk) < high
    hazard = found.probability.astype(np.float64)
    assert 0 <= hazard.min() <= hazard.max() <= 1
    mean = survival_negative_log_likelihood(np.broadcast_to(hazard.mean(0), hazard.shape), found.target, event)
    own = survival_negative_log_likelihood(hazard, found.target, event)
    assert own < mean or low < 0.7


def test_a_benchmark_of_whole_sites_shows_where_the_risk_lies(export: Path, tmp_path: Path) -> None:
    alone = [{"kind": "cox_regression", "modalities": [name]} for name in ("rna", "clinical")]
    tree = {
        "name": "planted",
        "card": str(export / "card.yaml"),
        "folds": 2,
        "systems": {"mean": {"model": {"kind": "mean", "width": 4}}},
        "baselines": [*alone, {"kind": "cox_regression"}],
        "reference": "cox_regression",
        "finetune": {"epochs": 1, "passes_train": 1, "passes_eval": 2},
        "passes": 2,
        "bootstrap": 50,
    }
    (tmp_path / "job.yaml").write_text(json.dumps(tree))
    command = ["bench", str(tmp_path / "job.yaml"), "--raw", str(export), "--out", str(tmp_path / "out"), "--executor", "serial"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = Bench.model_validate_json((tmp_path / "out" / "bench.json").read_text())
    assert (found.about.num_studies, found.about.num_sites) == (PATIENTS, len(SITES))
    assert sorted(site for fold in found.about.folds for site in fold.sites) == sorted(SITES)
    rows = {row.system: row for row in found.rows}
    assert set(rows) == {"mean", "cox_rna", "cox_clinical", "cox_regression"}
    assert rows["cox_rna"].metrics["c_index"].value > 0.75 > 0.65 > rows["cox_clinical"].metrics["c_index"].value
    assert rows["cox_clinical"].differences["c_index"].high < 0
    assert rows["cox_regression"].metrics["nll"].value < rows["cox_clinical"].metrics["nll"].value
    assert "cox_clinical" in (tmp_path / "out" / "results.md").read_text()


def test_cox_names_what_it_cannot_read(release: Release) -> None:
    with pytest.raises(SpecError, match="found 'mri'|found mri"):
        CoxBaseline(CoxRegressionConfig(modalities=("mri",)), release, 64)


def held_out_subjects(release: Release) -> list[str]:
    table = release.subjects()
    return [who for who, split in zip(table["subject"].to_pylist(), table["split"].to_pylist(), strict=True) if split == "ood"]
