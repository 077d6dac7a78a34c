from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from planted_wards import write_job

from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError
from draf_dist.evaluation.baselines import ClassBaseline, Corrupted, LogisticRegressionConfig
from draf_dist.evaluation.bench_cell import Cell
from draf_dist.evaluation.bench_job import BenchJob, load_bench_job
from draf_dist.models.fusion import FusionConfig
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
        ("reference=nothing", "reference 'nothing' is none of mean, draf, logistic_regression"),
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


def test_a_condition_changes_no_cell(tmp_path: Path) -> None:
    plain = load(tmp_path)
    more = load(tmp_path, "conditions={mcar: {operation: {kind: missing, grid: [0, 0.5]}}}")
    assert cell(tmp_path).identity == replace(cell(tmp_path), conditions=tuple(more.conditions.items())).identity
    assert "conditions" not in plain.model_dump(mode="json")
    assert LogisticRegressionConfig().model_dump(mode="json").keys() == {"kind", "inverse_penalties"}
    with pytest.raises(SpecError, match="the condition clean is always there"):
        load(tmp_path, "conditions={clean: {operation: {kind: missing, grid: [0, 0.5]}}}")


def test_an_override_of_one_system_leaves_those_of_the_same_anchor_alone(tmp_path: Path) -> None:
    path = tmp_path / "bench.yaml"
    systems = (
        "systems: {one: {model: &model {kind: mean, width: 8}}, two: {model: *model}, three: {model: {<<: *model, kind: mda}}}"
    )
    path.write_text(f"name: anchors\ncard: {tmp_path}/card.yaml\n{systems}\nreference: one\n")
    jobs = load_bench_job(path, ["systems.one.model.width=4"]).jobs("x")
    assert {name: job.model.width for name, job in jobs.items()} == {"one": 4, "two": 8, "three": 8}
    assert jobs["three"].model.kind == "mda"


@pytest.fixture
def zoo() -> BenchJob:
    return load_bench_job(Path(__file__).resolve().parents[2] / "jobs" / "bench_zoo_eicu.yaml")


def kinds(union: Any) -> set[str]:
    members = get_args(get_args(union)[0])
    return {member.model_fields["kind"].default for member in members}


def test_the_zoo_has_every_kind_of_fusion_model_and_baseline(zoo: BenchJob) -> None:
    """A new model is not forgotten there."""
    assert {job.model.kind for job in zoo.jobs("zoo").values()} == kinds(FusionConfig)
    of_classes = {member.model_fields["kind"].default for member in get_args(ClassBaseline)}
    assert {baseline.kind for baseline in zoo.baselines} == of_classes


def test_the_zoo_is_fair(zoo: BenchJob) -> None:
    """What a system may differ in is what it is: its model, its loss, how often it is asked; not data, law, schedule or dropout."""
    jobs = zoo.jobs("zoo")
    own = {"name", "model", "objective", "passes_train"}
    shared = [job.model_dump(mode="json", exclude=own) for job in jobs.values()]
    assert all(each == shared[0] for each in shared)
    rates = {name: set(dropouts(job.model)) for name, job in jobs.items()}
    assert rates == dict.fromkeys(jobs, {0.2})
    assert all(any(value for _, value in found(job.model, "presence_bits")) for job in jobs.values())
    assert all(value for _, value in found(jobs["early"].model, "observed_bits"))
    law = jobs["mean_mc"].corruption
    assert [baseline.corrupted for baseline in zoo.baselines] == [Corrupted(law=law, copies=4)] * len(zoo.baselines)


def dropouts(spec: Spec) -> Iterator[float]:
    yield from (value for name, value in found(spec, "dropout") if isinstance(value, float))


def found(spec: Spec, name: str) -> Iterator[tuple[str, Any]]:
    """Values of the fields whose name ends so, in a spec and all within it but for encoders of images, which it has none of."""
    for field, value in spec:
        if field in ("image", "volume"):
            continue
        if isinstance(value, Spec):
            yield from found(value, name)
        elif field.endswith(name):
            yield field, value


SHARED = {
    "bench_findings_eicu": {"mean_mc", "severity_rejection", "severity_cross_modal_gate", "draf_alpha_0"},
    "bench_bits_eicu": {"mean_mc", "concat", "draf_alpha_1"},
    "bench_parts_eicu": {"mean_mc", "late_mean", "draf_alpha_0", "drfuse", "aum"},
}


@pytest.mark.parametrize("name", SHARED)
def test_what_asks_further_differs_from_the_zoo_by_what_it_asks_alone(zoo: BenchJob, name: str) -> None:
    """Systems of one name are one system, so the two tables can be laid side by side; the others differ in model, loss or law."""
    further = load_bench_job(Path(__file__).resolve().parents[2] / "jobs" / f"{name}.yaml")
    jobs, known = further.jobs("further"), zoo.jobs("zoo")
    assert jobs.keys() & known.keys() == SHARED[name]
    assert all(jobs[system] == known[system] for system in SHARED[name])
    own = {"name", "model", "objective", "corruption"}
    assert len({job.model_dump_json(exclude=own) for job in (*jobs.values(), known["mean_mc"])}) == 1
    assert (further.folds, further.fold_seed, further.card, further.passes) == (zoo.folds, zoo.fold_seed, zoo.card, zoo.passes)
