"""Labels and times are learned like classes: from an export to a trained run, and the scores of validation by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from draf_dist.config.spec import parse_yaml, validate_spec
from draf_dist.data.prepare import prepare
from draf_dist.errors import SpecError
from draf_dist.losses.survival import survival_nll
from draf_dist.losses.task import modality_losses, task_loss, unimodal_task_loss
from draf_dist.models.link import Link, link_of
from draf_dist.models.uncertainty import decompose
from draf_dist.schema.batch import MultiLabelTarget, SurvivalTarget
from draf_dist.schema.label import MultiLabelSpec
from draf_dist.sources.card import Card
from draf_dist.sources.hospital_export import HospitalExport
from draf_dist.training.job import FinetuneJob
from draf_dist.training.run import train

CARD = """
name: clinic
licence: {name: none}
split: {public_subject_key: true}
sites: {column: hospital, groups: {north: N, south: S}}
tables: {visits: {path: visits.csv, subject: person, study: visit}}
studies: {table: visits}
label: LABEL
labels:
  findings: {kind: multilabel, labels: {edema: e, effusion: f}, unknown: ["9"]}
  death: {kind: survival, time: months, event: dead, unit: months, edges: [4, 8, 16]}
modalities:
  - {kind: table, name: heart, table: visits, variables: [{name: x}]}
  - {kind: table, name: lungs, table: visits, variables: [{name: z}]}
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x decides edema and the hazard, z effusion; a third of effusion is not known, and half of the times are censored."""
    folder = tmp_path_factory.mktemp("raw")
    generator = np.random.default_rng(5)
    x, z = generator.normal(size=(2, 600))
    edema, effusion = (generator.random(600) < 1 / (1 + np.exp(-3 * value)) for value in (x, z))
    death, leaves = generator.exponential(8 * np.exp(-1.2 * x)), generator.exponential(16, 600)
    lines = ["person,visit,hospital,x,z,e,f,months,dead"]
    for i in range(600):
        known = str(int(effusion[i])) if i % 3 else "9"
        months, dead = min(death[i], leaves[i]), int(death[i] < leaves[i])
        lines.append(f"p{i},v{i},{'NS'[i % 2]},{x[i]:.4f},{z[i]:.4f},{int(edema[i])},{known},{months:.4f},{dead}")
    (folder / "visits.csv").write_text("\n".join(lines) + "\n")
    return folder


def released(raw: Path, label: str, url: Path) -> str:
    card = validate_spec(parse_yaml(CARD.replace("LABEL", label), where="card"), Card, where="card")
    prepare(HospitalExport(card, raw), str(url), subject_key=b"k" * 32)
    return str(url)


def validated(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "nll" in line]


@pytest.mark.parametrize("kind", ["draf", "mean", "late_mean"])
@pytest.mark.parametrize(("label", "score", "least"), [("findings", "auroc", 0.8), ("death", "c_index", 0.65)])
def test_a_run_learns_what_was_planted(raw: Path, tmp_path: Path, kind: str, label: str, score: str, least: float) -> None:
    release = released(raw, label, tmp_path / "release")
    settings = {
        "release": release,
        "name": "t",
        "model": {"kind": kind, "width": 8},
        "epochs": 15,
        "patience": 15,
        "passes_eval": 4,
        "batch_size": 32,
    }
    settings |= {"optimizer": {"learning_rate": 0.01}, "corruption": {"probability": 0.1, "modality_dropout": 0.1}}
    train(FinetuneJob.model_validate(settings), str(tmp_path / "run"), console=Console(quiet=True))
    found = validated(tmp_path / "run")
    assert min(line["nll"] for line in found) < found[0]["nll"]
    assert max(line[score] for line in found) > least
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_cox_trains_a_run_too_and_refuses_other_labels(raw: Path, tmp_path: Path) -> None:
    settings = {
        "name": "t",
        "model": {"kind": "mean", "width": 8},
        "epochs": 15,
        "patience": 15,
        "passes_eval": 4,
        "batch_size": 32,
    }
    settings |= {"optimizer": {"learning_rate": 0.01}, "objective": {"kind": "cox", "lambda_nll": 0.0}}
    job = FinetuneJob.model_validate(settings | {"release": released(raw, "death", tmp_path / "times")})
    train(job, str(tmp_path / "run"), console=Console(quiet=True))
    assert max(line["c_index"] for line in validated(tmp_path / "run")) > 0.65
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "cox" in next(line for line in steps if "terms" in line)["terms"]
    job = FinetuneJob.model_validate(settings | {"release": released(raw, "findings", tmp_path / "labels")})
    with pytest.raises(SpecError, match="expected a label of kind survival, found findings"):
        train(job, str(tmp_path / "other"), console=Console(quiet=True))


def test_a_loss_of_labels_is_the_mean_over_the_known_ones() -> None:
    logits = torch.tensor([[[0.0, 2.0, -1.0], [1.0, 1.0, 1.0], [3.0, 0.0, 0.0]]])
    target = MultiLabelTarget(
        torch.tensor([[True, False, False], [True, True, False], [False, False, False]]),
        torch.tensor([[True, True, False], [True, True, True], [False, False, False]]),
    )
    term = task_loss(logits, target, torch.ones(3))
    first = (math.log(2) + math.log(1 + math.exp(2))) / 2
    second = (2 * math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 3
    assert term.weight == 2
    assert term.numerator.item() == pytest.approx(first + second, rel=1e-6)


def test_a_loss_of_times_is_that_of_the_oracle() -> None:
    """O14: an event in interval 2, then a time that is censored there."""
    logits = torch.logit(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)).expand(1, 2, 4)
    interval, event = torch.tensor([2, 2]), torch.tensor([True, False])
    assert survival_nll(logits, interval, event)[0].tolist() == pytest.approx([1.5324769, 0.4111074], abs=1e-6)
    plain = survival_nll(logits, interval, event, uncensored=0.0)[0].tolist()
    assert plain == pytest.approx([-math.log(0.9 * 0.8 * 0.3), -math.log(0.9 * 0.8 * 0.7)])


def test_unimodal_losses_are_those_of_each_modality_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 2, 4, generator=generator)
    target = SurvivalTarget(torch.rand(5), torch.arange(5) % 2 == 0, torch.arange(5) % 4, torch.tensor([True] * 4 + [False]))
    alone = torch.stack(
        [task_loss(logits[:, [row], m], _row(target, row), torch.ones(1)).numerator for row in range(5) for m in range(2)]
    )
    torch.testing.assert_close(modality_losses(logits, target), alone.view(5, 2))
    present = torch.tensor([[True, True], [True, False], [False, True], [True, True], [True, True]])
    term = unimodal_task_loss(logits, target, present, torch.ones(5))
    by_hand = sum(alone.view(5, 2)[row][present[row]].mean() for row in range(4))
    assert (term.weight, term.numerator.item()) == (4, pytest.approx(float(by_hand), rel=1e-6))


def _row(target: SurvivalTarget, row: int) -> SurvivalTarget:
    return SurvivalTarget(*(getattr(target, name)[[row]] for name in ("time", "event", "interval", "observed")))


def test_uncertainty_of_labels_is_the_mean_over_binary_ones() -> None:
    logits = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    link = link_of(MultiLabelSpec(name="f", labels=("a", "b", "c")))
    p = logits.sigmoid()
    by_label = [decompose(torch.stack([1 - p[..., k], p[..., k]], -1)) for k in range(3)]
    for name, value in link.uncertainties(logits).items():
        torch.testing.assert_close(value, torch.stack([label[name] for label in by_label]).mean(0))
    torch.testing.assert_close(link.uncertainties(logits)["epistemic"], p.var(0, correction=0).mean(-1))


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_link_leads_there_and_back(exclusive: bool) -> None:
    link = Link(exclusive=exclusive)
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    probability = link.probability(logits)
    torch.testing.assert_close(link.probability(link.logits(probability)), probability)
    certain = link.logits(torch.tensor([0.0, 1.0]))
    assert certain.isfinite().all()
    prior = link.probability(link.prior(torch.tensor([30.0, 70.0]), torch.tensor([100.0, 100.0])))
    torch.testing.assert_close(prior, torch.tensor([0.3, 0.7]))
    assert link.prior(torch.tensor([0.0, 100.0]), torch.tensor([100.0, 100.0])).isfinite().all()
