from dataclasses import replace
from pathlib import Path

import pytest
from planted_wards import write_job

from draf_dist.errors import SpecError
from draf_dist.evaluation.baselines import LogisticRegressionConfig
from draf_dist.evaluation.bench_cell import Cell
from draf_dist.evaluation.bench_job import load_bench_job
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.mean import MeanConfig


def load(folder: Path, *overrides: str) -> object:
    return load_bench_job(write_job(folder), overrides)


def test_a_system_is_the_common_job_with_its_own_parts_changed(tmp_path: Path) -> None:
    jobs = load(tmp_path, "systems.draf.model.reliability_alpha=64", "systems.draf.epochs=7").jobs("x")
    assert isinstance(jobs["mean"].model, MeanConfig)
    assert isinstance(jobs["draf"].model, DrafConfig)
    assert (jobs["draf"].model.width, jobs["draf"].model.reliability_alpha, jobs["draf"].epochs) == (8, 64, 7)
    assert (jobs["mean"].epochs, jobs["mean"].name, jobs["draf"].batch_size) == (2, "mean", 32)


def test_the_problems_of_all_systems_come_together_with_the_nearest_key(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as raised:
        load(
            tmp_path,
            "systems.mean={modle: {}}",
            "systems.draf.seed=3",
            "systems.third={epochs: 0}",
            "systems.fourth={pretrained: {blood: runs/elsewhere}}",
            "systems.fifth={label_fraction: 0.5}",
        )
    text = str(raised.value)
    assert "systems.mean: modle" in text
    assert "Did you mean 'model'?" in text
    assert "systems.draf.seed: expected no such key" in text
    assert "systems.third: epochs" in text
    assert "systems.fourth.pretrained: expected none" in text
    assert "systems.fifth.label_fraction: expected 1" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reference=nothing", "reference is none of mean, draf, logistic_regression"),
        ("systems={logistic_regression: {}}", "has the name of one"),
        ("seeds=[1, 1]", "a seed is listed twice"),
        ("fold=3", "Did you mean 'folds'?"),
    ],
)
def test_what_can_not_be_compared_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError, match="bench.yaml") as raised:
        load(tmp_path, override)
    assert message.replace("\\", "") in str(raised.value)


def cell(tmp_path: Path, *overrides: str, system: str = "draf") -> Cell:
    job = load(tmp_path, *overrides)
    return Cell(system, 0, 0, job.jobs("x")[system], "somewhere@0123456789abcdef", job.passes, job.batch_size, "out/cells")


def test_a_cell_is_named_by_what_decides_its_numbers(tmp_path: Path) -> None:
    first = cell(tmp_path)
    assert cell(tmp_path, "systems.mean={epochs: 9}", "bootstrap=7", "name=other").identity == first.identity
    assert replace(first, release="elsewhere@0123456789abcdef", fold=3, folder="s3://b/c").identity == first.identity
    changed = [
        cell(tmp_path, "systems.draf.epochs=9"),
        cell(tmp_path, "finetune.optimizer={weight_decay: 0.5}"),
        cell(tmp_path, "passes=9"),
        cell(tmp_path, system="mean"),
        replace(first, release="somewhere@fedcba9876543210"),
        replace(first, seed=1),
        replace(first, work=LogisticRegressionConfig()),
    ]
    assert len({first.identity, *(each.identity for each in changed)}) == 1 + len(changed)
    assert first.url == f"out/cells/draf/fold-0-seed-0-{first.identity[:8]}"
