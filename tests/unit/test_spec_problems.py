"""What a wrong spec is told: the key as it stands in the file, what was expected and found, nothing that only follows."""

from pathlib import Path

import pytest

from draf_dist.config.spec import validate_spec
from draf_dist.errors import SpecError
from draf_dist.evaluation.job import EvaluateJob
from draf_dist.sources.card_model import Card
from draf_dist.training.jobs import load_job
from draf_dist.training.pretrain_job import PretrainJob

JOB = "kind: finetune\nname: x\nrelease: data\n"
KINDS = "draf, mean, concat, late_mean, healnet, aum, early, mda"


def told(folder: Path, *overrides: str) -> list[str]:
    """The lines about a job with these overrides, without the file's name."""
    path = folder / "job.yaml"
    path.write_text(JOB)
    with pytest.raises(SpecError) as caught:
        load_job(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_an_objective_that_follows_from_the_model_is_no_problem_of_its_own(tmp_path: Path) -> None:
    (line,) = told(tmp_path, "epochs=many")
    assert line.startswith("epochs: ")


def test_items_that_are_wrong_are_not_too_few_besides() -> None:
    with pytest.raises(SpecError) as caught:
        validate_spec({"splits": ["tset"]}, EvaluateJob, where="--set")
    assert str(caught.value) == "--set: splits.0: Input should be 'test' or 'ood', found 'tset'."


@pytest.mark.parametrize(
    ("override", "start", "end"),
    [
        ("model={kind: AUM}", f"model.kind: expected one of {KINDS}", "found 'AUM'. Did you mean 'aum'?"),
        ("model={width: 3}", f"model.kind: expected one of {KINDS}", "found nothing. Choose one of them."),
        ("objective={kind: foo}", "objective.kind: expected one of fusion, aum, drfuse, cox", "found 'foo'. Choose one of them."),
        (
            "corruption.operations=[{kind: gausian}]",
            "corruption.operations.0.kind: expected one of gaussian, downsample",
            "found 'gausian'. Did you mean 'gaussian'?",
        ),
    ],
)
def test_a_kind_that_is_none_is_told_with_those_there_are(tmp_path: Path, override: str, start: str, end: str) -> None:
    (line,) = told(tmp_path, override)
    assert line.startswith(start)
    assert line.endswith(end)


def test_what_a_spec_says_of_several_keys_is_told_without_the_section(tmp_path: Path) -> None:
    (line,) = told(tmp_path, "objective.kind=drfuse")
    assert line == (
        "model draf is trained by the objective fusion or cox, not drfuse: set objective.kind to fusion, or choose another "
        "model.kind."
    )


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ({"kind": "multi_label"}, "labels.y.kind: expected one of class, multilabel, survival, segmentation, found 'multi_label'."),
        ({"kind": "survival", "time": "t", "event": "e", "edges": [3, 1]}, "labels.y: edges must rise, found [3.0, 1.0]."),
        (
            {"kind": "multilabel", "labels": {"a": "b"}, "tyme": 1},
            "labels.y.tyme: expected a known key, found 'tyme'. Known",
        ),
        ({"column": "c", "classes": ["a"]}, "labels.y.classes: "),
    ],
)
def test_a_label_is_named_as_in_the_card_whatever_kind_it_is(label: dict[str, object], expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        validate_spec({"kind": "hospital_export", "labels": {"y": label}}, Card, where="card.yaml")
    assert any(line.startswith(f"card.yaml: {expected}") for line in str(caught.value).splitlines()), str(caught.value)


def test_a_modality_whose_kind_is_also_a_key_is_named_by_its_keys_alone() -> None:
    modality = {"kind": "table", "name": "m", "table": "t", "variables": [{"name": "ward", "type": "categorical", "unti": "kg"}]}
    with pytest.raises(SpecError) as caught:
        validate_spec({"kind": "hospital_export", "modalities": [modality]}, Card, where="card.yaml")
    lines = str(caught.value).splitlines()
    assert "card.yaml: modalities.0.variables.0.unti: expected a known key, found 'unti'. Did you mean 'unit'?" in lines


@pytest.mark.parametrize(("kind", "remedy"), [("mir", "Did you mean 'mri'?"), (None, "Choose one of them.")])
def test_of_a_union_with_a_member_without_a_kind_only_real_kinds_are_offered(kind: object, remedy: str) -> None:
    objective = {"kind": "simclr", "modality": "cxr", "views": {"kind": kind}}
    with pytest.raises(SpecError) as raised:
        validate_spec({"kind": "pretrain", "name": "x", "release": "r", "objective": objective}, PretrainJob, where="job.yaml")
    assert str(raised.value) == f"job.yaml: objective.views.kind: expected one of ct, mri, cxr, found {str(kind)!r}. {remedy}"
