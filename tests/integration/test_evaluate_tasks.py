"""Runs on labels and on times, from training to the report and the gate: what was planted is found, and nothing is lost."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_clinic import clinic_release, clinic_run, write_clinic
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.continual.gate import run_gate
from draf_dist.continual.gate_report import render as render_verdict
from draf_dist.continual.policy import GatePolicy
from draf_dist.continual.verdict import Verdict
from draf_dist.data.corruption import EhrNoise, MissingNotAtRandom, Swap
from draf_dist.data.release import open_release
from draf_dist.errors import InterruptedRunError, SpecError
from draf_dist.evaluation.answers import LabelAnswers, TimeAnswers
from draf_dist.evaluation.evaluate import RANKS_ONLY, check_predictions, evaluate, read_evaluation
from draf_dist.evaluation.follow_up import follow_up_of
from draf_dist.evaluation.job import EvaluateJob, SweepSettings
from draf_dist.evaluation.predict import check_coverage
from draf_dist.evaluation.predictions import read_predictions
from draf_dist.evaluation.report import render
from draf_dist.evaluation.results import Evaluation
from draf_dist.evaluation.scoring import scores_of, task_asked
from draf_dist.schema.label import SegmentationSpec
from draf_dist.storage import open_store
from draf_dist.training.run_folder import open_run
from draf_dist.training.summary import summarise

SWEEP = SweepSettings(operations=(EhrNoise(grid=(0, 10.0)), Swap(), MissingNotAtRandom(grid=(0, 0.5))), passes=2, max_studies=40)
JOB = EvaluateJob(passes=4, bootstrap=20, sweep=SWEEP)


@dataclass(frozen=True)
class Made:
    """One task: its release, its run, and what came of it."""

    release: str
    run: str
    evaluation: Evaluation


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_clinic(tmp_path_factory.mktemp("clinic"))


@pytest.fixture(scope="module")
def labels(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made("findings", raw, tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def times(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made("death", raw, tmp_path_factory.mktemp("times"))


def made(label: str, raw: Path, folder: Path) -> Made:
    release = clinic_release(raw, label, folder / "release")
    run = clinic_run(release, folder / "run")
    return Made(release, run, evaluate(run, JOB))


@pytest.fixture(params=["labels", "times"])
def task(request: pytest.FixtureRequest) -> Made:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Made)
    return found


def test_every_study_is_predicted_once_with_what_is_known_of_it(task: Made) -> None:
    release = open_release(task.release)
    table = release.subjects()
    text = dict(zip(table["uid"].to_pylist(), table["label"].to_pylist(), strict=True))
    for split in ("val", "test", "ood"):
        (found,) = read_predictions(open_store(task.run), f"predictions/{split}.parquet")
        check_coverage(found, release.manifest.receipts[split])
        assert [stored(found.answers, row) for row in range(found.num_studies)] == [text[int(uid)] for uid in found.uid]
    check_predictions(open_store(task.run), task.evaluation)


def stored(answers: object, row: int) -> str:
    """As the release writes it; times come through single precision."""
    if isinstance(answers, TimeAnswers):
        return f"{float(f'{answers.time[row]:.4f}')!r}{'' if answers.event[row] else '+'}"
    assert isinstance(answers, LabelAnswers)
    pairs = zip(answers.label[row], answers.observed[row], strict=True)
    return "".join(str(int(y)) if seen else "-" for y, seen in pairs)


def test_validation_nll_is_that_of_training(task: Made) -> None:
    best = open_run(task.run).end()
    assert best is not None
    assert task.evaluation.temperature.nll_raw == pytest.approx(best["best_loss"], abs=1e-6)
    assert task.evaluation.temperature.nll_scaled <= task.evaluation.temperature.nll_raw


def test_the_same_evaluation_gives_the_same_bytes_also_when_it_goes_on(task: Made, tmp_path: Path) -> None:
    store = open_store(task.run)
    paths = ["evaluation.json", "report.html", *store.list("predictions")]
    before = {path: store.read(path) for path in paths}
    copy = tmp_path / Path(task.run).name
    shutil.copytree(task.run, copy)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "predict" and done == 4:
            raise InterruptedRunError("asked to stop")

    with pytest.raises(InterruptedRunError):
        evaluate(str(copy), JOB, on_progress=stop)
    assert len(list((copy / "evaluating").rglob("*.part"))) == 4
    evaluate(str(copy), JOB)
    again = open_store(str(copy))
    assert {path: again.read(path) for path in paths} == before
    assert read_evaluation(again) == task.evaluation


def test_labels_have_their_scores_and_the_planted_signal_is_found(labels: Made) -> None:
    (test, ood), about = labels.evaluation.splits, labels.evaluation.about
    assert (about.task, about.classes) == ("multilabel", ("edema", "effusion"))
    assert test.scaled["auroc"].value > 0.8
    assert test.scaled["auroc"].low < test.scaled["auroc"].value < test.scaled["auroc"].high
    (found,) = read_predictions(open_store(labels.run), "predictions/test.parquet")
    assert isinstance(found.answers, LabelAnswers)
    for k, part in enumerate(test.labels):
        assert part.num_observed == found.answers.observed[:, k].sum()
        assert part.num_positive == found.answers.label[:, k].sum() == test.class_counts[k]
        assert part.metrics["auroc"].value > 0.75
    assert test.labels[1].num_observed < test.num_studies
    assert test.scaled["auroc"].value == pytest.approx(np.mean([part.metrics["auroc"].value for part in test.labels]))
    assert (test.times, len(ood.labels)) == (None, 2)


def test_times_have_their_scores_and_the_planted_signal_is_found(times: Made) -> None:
    test, about = times.evaluation.splits[0], times.evaluation.about
    assert (about.task, about.classes) == ("survival", ("censored", "event"))
    assert test.scaled["c_index"].low > 0.6
    assert 0 < test.scaled["ibs"].value < 0.25
    assert test.times is not None
    assert [curve.num_studies for curve in test.times.curves][0] == test.num_studies == sum(test.class_counts)
    high, low = test.times.curves[3], test.times.curves[1]
    assert high.observed[40] < low.observed[40]
    assert {diagram.at for diagram in test.times.diagrams} == {4.0, 8.0, 16.0}
    assert (test.alarms, test.risk_coverage) == (None, ())


def test_scores_of_times_are_corrected_by_the_censoring_of_training(times: Made) -> None:
    (found,) = read_predictions(open_store(times.run), "predictions/test.parquet")
    known, follow_up = found.labelled(), follow_up_of(open_release(times.release))
    assert follow_up is not None
    by_hand = scores_of(known, follow_up, times.evaluation.temperature.value).short()
    scaled = times.evaluation.splits[0].scaled
    assert {name: scaled[name].value for name in by_hand} == pytest.approx(by_hand)
    train = [label for split, label in split_labels(times.release) if split == "train"]
    assert len(follow_up.censoring.time) == len({np.float32(label.removesuffix("+")) for label in train})


def split_labels(release: str) -> list[tuple[str, str]]:
    table = open_release(release).subjects()
    return list(zip(table["split"].to_pylist(), table["label"].to_pylist(), strict=True))


def test_a_corruption_of_what_decides_costs_and_of_what_does_not_costs_nothing(times: Made) -> None:
    sweep = times.evaluation.sweep
    assert sweep is not None
    cost = {(cell.operation, cell.modality): cell.metrics["c_index_difference"].value for cell in sweep.cells}
    assert cost["swap", "heart"] > 0.1
    assert abs(cost["swap", "lungs"]) < 0.1
    assert ("missing_not_at_random", "all") in cost
    assert {cell.modality for cell in sweep.removals if cell.operation == "only"} == {"heart", "lungs"}


def test_the_report_is_of_the_task(labels: Made, times: Made) -> None:
    of_labels, of_times = render(labels.evaluation), render(times.evaluation)
    for text in ("Label by label", "effusion", "Abstention", "ECE floor", "mc_scope: full"):
        assert text in of_labels
    for text in ("Kaplan and Meier", "event by 8 months", "Not defined for times", "C-index (Uno)", "highest third"):
        assert text in of_times
    assert "Alarms" not in of_times
    assert "AUROC" not in of_times
    assert "Kaplan" not in of_labels


def test_what_is_stored_is_valid_json(task: Made) -> None:
    text = open_store(task.run).read("evaluation.json").decode()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in evaluation.json"))


def test_the_command_prints_the_scores_of_the_task(times: Made) -> None:
    done = CliRunner().invoke(app, ["evaluate", times.run, "--set", "sweep=null", "--set", "bootstrap=10", "--set", "passes=4"])
    assert done.exit_code == 0, done.output
    assert "C INDEX IPCW" in done.stdout
    assert "AUROC" not in done.stdout


def gate(champion: str, challenger: str, release: str) -> Verdict:
    policy = GatePolicy(min_subjects=10, replicates=1000, passes=4, require="non_inferior")
    return run_gate(champion, challenger, open_release(release).pinned_url, policy)


def test_a_model_does_itself_no_harm_at_the_gate(task: Made) -> None:
    verdict = gate(task.run, task.run, task.release)
    assert verdict.decision == "promote"
    assert (verdict.comparison.overall.harm, verdict.comparison.task) == (0, task.evaluation.about.task)
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict
    assert "no worse" in render_verdict(verdict)


def test_a_worse_model_of_times_is_refused(times: Made, tmp_path: Path) -> None:
    """One epoch of next to no learning against one that ranks."""
    worse = clinic_run(times.release, tmp_path / "worse", epochs=1, optimizer={"learning_rate": 1e-6})
    verdict = gate(times.run, worse, times.release)
    overall = verdict.comparison.overall
    assert verdict.decision == "refuse"
    assert overall.harm > 0.02
    assert overall.harm == pytest.approx(overall.challenger["nll"] - overall.champion["nll"])
    assert overall.c_index_difference is not None
    assert overall.c_index_difference.value == pytest.approx(overall.challenger["c_index"] - overall.champion["c_index"])
    assert (overall.negative_flips, overall.auroc_difference.reason) == (None, "times have no AUROC")
    assert "difference of C-index" in render_verdict(verdict)


def test_a_model_that_only_ranks_is_evaluated_with_a_warning_and_refused_at_the_gate(times: Made, tmp_path: Path) -> None:
    ranking = clinic_run(times.release, tmp_path / "cox", objective={"kind": "cox", "lambda_nll": 0.0})
    found = evaluate(ranking, JOB.model_copy(update={"sweep": None, "bootstrap": 0}))
    assert RANKS_ONLY in found.warnings
    assert RANKS_ONLY not in times.evaluation.warnings
    assert found.splits[0].scaled["c_index"].value > 0.6
    with pytest.raises(SpecError, match="challenger.*Cox's likelihood alone"):
        gate(times.run, ranking, times.release)


def test_masks_are_refused_with_a_remedy() -> None:
    with pytest.raises(SpecError, match="expected classes, labels or times, found masks"):
        task_asked(SegmentationSpec(name="regions", modality="t1", structures=("background", "cortex")), where="draf evaluate")


def test_a_run_says_how_uncertainty_goes_with_risk(task: Made) -> None:
    """What training logged of its best validation is what the evaluation finds there."""
    summary = summarise(task.run)
    best = next(line for line in summary.epochs if line["step"] == summary.best_step)
    for signal in task.evaluation.signals:
        expected = signal.uncertainty_risk.get("used", signal.uncertainty_risk.get("epistemic"))
        assert best[f"risk_correlation/{signal.modality}"] == pytest.approx(expected, abs=1e-3)
    warned = [text for text in task.evaluation.warnings if "goes with its risk" in text]
    assert [text.split(":")[0] for text in summary.warnings] == [text.split(":")[0] for text in warned]
