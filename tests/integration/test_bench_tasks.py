"""`draf bench` on labels and on times: the primary metric of the task, out of fold, with paired differences and Holm's p."""

from pathlib import Path

import numpy as np
import pytest
from planted_clinic import CARD, SUBJECT_KEY, write_clinic
from test_bench import Heard

from draf_dist.data.release import open_release
from draf_dist.errors import SpecError
from draf_dist.evaluation.answers import TimeAnswers
from draf_dist.evaluation.bench import Prepared, prepare_bench, run_bench
from draf_dist.evaluation.bench_job import load_bench_job
from draf_dist.evaluation.bench_report import columns_of, markdown
from draf_dist.evaluation.bench_results import Bench
from draf_dist.evaluation.follow_up import follow_up_of, follow_ups_of
from draf_dist.evaluation.predictions import read_predictions
from draf_dist.evaluation.scoring import scores_of
from draf_dist.executor import Serial
from draf_dist.storage import open_store

JOB = """
kind: bench
name: clinic
card: {card}
folds: 2
finetune:
  model: {{kind: mean, width: 8}}
  epochs: 12
  patience: 12
  batch_size: 32
  passes_train: 1
  passes_eval: 2
  optimizer: {{learning_rate: 0.02}}
systems:
  mean:
  unlearned: {{epochs: 1, optimizer: {{learning_rate: 1.0e-6}}}}
reference: mean
passes: 2
bootstrap: 100
"""


def prepared(folder: Path, label: str, *overrides: str) -> Prepared:
    (folder / "card.yaml").write_text(CARD.replace("label: LABEL", f"label: {label}"))
    (folder / "bench.yaml").write_text(JOB.format(card=folder / "card.yaml"))
    raw = folder / "raw"
    job = load_bench_job(folder / "bench.yaml", overrides)
    return prepare_bench(job, raw if raw.exists() else write_clinic(raw), str(folder / "out"), SUBJECT_KEY, Heard())


@pytest.fixture(scope="module")
def times(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Bench]:
    made = prepared(tmp_path_factory.mktemp("times"), "death", "baselines=[{kind: cox_regression}]")
    return made, run_bench(made, Serial(), Heard())


def test_times_are_compared_by_the_c_index(times: tuple[Prepared, Bench]) -> None:
    _, bench = times
    mean, unlearned, cox = bench.rows
    assert (bench.about.task, bench.about.classes) == ("survival", ("censored", "event"))
    assert sum(bench.about.class_counts) == bench.about.num_studies == 600
    assert mean.metrics["c_index"].low > 0.6
    assert cox.metrics["c_index"].low > 0.6
    difference = unlearned.differences["c_index"]
    assert difference.high < -0.05
    assert difference.value == pytest.approx(unlearned.metrics["c_index"].value - mean.metrics["c_index"].value)
    assert unlearned.holm["c_index"] == pytest.approx(2 * 2 / 101)
    assert unlearned.holm["c_index"] <= cox.holm["c_index"]
    assert (mean.holm, mean.differences) == ({}, {})
    assert Bench.model_validate_json(bench.model_dump_json()) == bench


def test_the_c_index_of_every_fold_is_told_beside_the_pooled_one(times: tuple[Prepared, Bench]) -> None:
    mean = times[1].rows[0]
    assert len(mean.c_index_by_fold) == 2
    assert mean.c_index_mean_fold == pytest.approx(np.mean(mean.c_index_by_fold))
    assert mean.c_index_median_fold == pytest.approx(np.median(mean.c_index_by_fold))
    assert (mean.auroc_by_fold, mean.auroc_median_fold, mean.ece_floor.mean) == ((), None, None)


def test_each_study_is_scored_by_the_censoring_of_its_own_model_s_training(times: tuple[Prepared, Bench]) -> None:
    made, bench = times
    follow_ups = follow_ups_of(made.releases)
    horizons = {each.horizon for each in follow_ups if each is not None}
    alone = [follow_up_of(open_release(release.pinned_url)) for release in made.releases]
    assert horizons == {min(each.horizon for each in alone if each is not None)}
    total, number = 0.0, 0
    for cell, release, follow_up in zip(
        [cell for cell in made.cells if cell.system == "mean"], made.releases, follow_ups, strict=True
    ):
        (found,) = read_predictions(open_store(cell.url), "predictions/ood.parquet")
        assert isinstance(found.answers, TimeAnswers)
        assert len(found.uid) == release.manifest.receipts["ood"].count
        temperature = bench.rows[0].temperatures[cell.fold]
        scores = scores_of(found.labelled(), follow_up, temperature)
        total, number = total + scores.short()["ibs"] * found.num_studies, number + found.num_studies
    assert bench.rows[0].metrics["ibs"].value == pytest.approx(total / number)


def test_the_table_speaks_of_times(times: tuple[Prepared, Bench]) -> None:
    text = markdown(times[1])
    assert "| system | C-index | C-index (Uno) | NLL | Integrated Brier | C-index, median fold |" in text
    assert "**-0." in text
    assert "AUROC" not in text
    assert columns_of("class")[-2:] == ("ECE (floor)", "AUROC, median fold")


def test_labels_are_compared_by_macro_auroc(tmp_path: Path) -> None:
    bench = run_bench(prepared(tmp_path, "findings"), Serial(), Heard())
    mean, unlearned = bench.rows
    assert (bench.about.task, bench.about.classes) == ("multilabel", ("edema", "effusion"))
    assert mean.metrics["auroc"].value > 0.8
    assert unlearned.differences["auroc"].high < 0
    assert len(mean.auroc_by_fold) == 2
    assert 0 < unlearned.holm["auroc"] < 0.05
    assert "| ECE |" in markdown(bench)


@pytest.mark.parametrize(
    ("label", "baseline", "message"),
    [
        ("death", "logistic_regression", "Take `{kind: cox_regression}` for times"),
        ("findings", "gradient_boosting", "expected none for several labels"),
        ("findings", "cox_regression", "expected a label of times"),
    ],
)
def test_a_baseline_that_can_t_learn_the_task_is_refused_before_anything_is_trained(
    tmp_path: Path, label: str, baseline: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        prepared(tmp_path, label, f"baselines=[{{kind: {baseline}}}]")
