"""The space of a campaign: paths and values are tried on the jobs before anything runs."""

from pathlib import Path
from typing import Any

import pytest
from small_runs import small_model

from draf_dist.errors import SpecError
from draf_dist.tuning.campaign_job import CampaignJob, Choices, Range, load_campaign
from draf_dist.tuning.point import base_value, jobs_at
from draf_dist.tuning.space import at_edge, check_space, describe

ROOT = Path(__file__).resolve().parents[2]
FINETUNE = {"name": "small", "release": "data/synth", "model": small_model()}
PRETRAIN = {"name": "pre", "release": "data/synth", "objective": {"kind": "simclr", "modality": "cxr"}}


def campaign(space: dict[str, Any], **changes: Any) -> CampaignJob:
    tree = {"name": "sought", "base": {"finetune": FINETUNE, "pretrain": PRETRAIN}, "budget": {"trials": 3}, "space": space}
    return CampaignJob.model_validate({**tree, **changes})


def refusal(space: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as raised:
        check_space(campaign(space), "c.yaml")
    return str(raised.value)


def test_the_shipped_campaign_fits_the_shipped_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shipped = load_campaign("tune/alpha_lambda_temperature.yaml", ["base.finetune.epochs=7", "release=s3://bucket/synth"])
    check_space(shipped, "shipped")
    assert list(shipped.stages) == ["pretrain", "finetune"]
    assert {job.release for job in shipped.stages.values()} == {"s3://bucket/synth"}
    assert shipped.stages["finetune"].epochs == 7
    assert base_value(shipped, "pretrain.objective.tau") == 0.1


def test_a_point_reaches_the_jobs_and_nothing_else_changes() -> None:
    sought = campaign(
        {"finetune.model.reliability_alpha": {"low": 0.1, "high": 10}, "pretrain.objective.tau": {"choices": [0.1, 0.2]}}
    )
    jobs = jobs_at(sought, {"finetune.model.reliability_alpha": 2.5, "pretrain.objective.tau": 0.2})
    assert (jobs["finetune"].model.reliability_alpha, jobs["pretrain"].objective.tau) == (2.5, 0.2)
    model = jobs["finetune"].model.model_copy(update={"reliability_alpha": sought.base.finetune.model.reliability_alpha})
    assert jobs["finetune"].model_copy(update={"model": model}) == sought.base.finetune


def test_every_unknown_path_is_refused_with_the_nearest_one() -> None:
    text = refusal({"finetune.model.reliability_alfa": {"low": 0.1, "high": 1}, "pretrain.objective.tua": {"choices": [1, 2]}})
    assert "'finetune.model.reliability_alpha'" in text
    assert "'pretrain.objective.tau'" in text


@pytest.mark.parametrize("path", ["finetune.model", "finetune.seed", "finetune.release", "pretrain.objective.kind.of", "epochs"])
def test_what_is_no_setting_with_one_value_is_refused(path: str) -> None:
    assert f"space.{path}: expected a setting of the base jobs with one value" in refusal({path: {"choices": [1, 2]}})


def test_both_ends_of_a_range_are_tried() -> None:
    assert "label_fraction = 0.0: " in refusal({"finetune.label_fraction": {"low": 0, "high": 1}})
    assert "label_fraction = 1.5: " in refusal({"finetune.label_fraction": {"low": 0.5, "high": 1.5}})


def test_a_range_of_fractions_does_not_fit_a_whole_number() -> None:
    assert "valid integer" in refusal({"finetune.epochs": {"low": 1, "high": 9}})
    check_space(campaign({"finetune.epochs": {"low": 1, "high": 9, "integer": True}}), "c.yaml")


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ({"low": 2, "high": 1}, "expected less than high"),
        ({"low": 0, "high": 1, "log": True}, "expected more than 0 with log"),
        ({"low": 0.5, "high": 2, "integer": True}, "expected whole numbers"),
        ({"choices": [1, 1]}, "listed twice"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused(parameter: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        campaign({"finetune.epochs": parameter})


def test_choices_keep_their_kind() -> None:
    (parameter,) = campaign({"finetune.model.presence_bits": {"choices": [True, False]}}).space.values()
    assert parameter.choices == (True, False)
    assert all(type(choice) is bool for choice in parameter.choices)


def test_a_pretrained_encoder_is_given_once() -> None:
    base = {"finetune": {**FINETUNE, "pretrained": {"cxr": "runs/other"}}, "pretrain": PRETRAIN}
    with pytest.raises(ValueError, match="since pretrain makes it"):
        campaign({"finetune.epochs": {"choices": [1, 2]}}, base=base)


def test_the_edge_of_a_range_is_judged_on_its_scale() -> None:
    log = Range(low=0.1, high=100, log=True)
    assert [at_edge(log, value) for value in (0.1, 0.11, 0.2, 50.0, 95.0)] == [True, True, False, False, True]
    assert not at_edge(Range(low=0, high=100), 50)
    assert [at_edge(Choices(choices=(0.05, 0.1, 0.5)), value) for value in (0.05, 0.1, 0.5)] == [True, False, True]
    assert not at_edge(Choices(choices=("draf", "mean")), "draf")
    # Of two numbers either is an end: that says nothing.
    assert not at_edge(Choices(choices=(0.1, 0.5)), 0.5)


def test_a_parameter_is_described_in_words() -> None:
    assert describe(Range(low=0.1, high=100, log=True)) == "0.1 to 100, log-uniform"
    assert describe(Range(low=1, high=8, integer=True)) == "1 to 8, whole"
    assert describe(Choices(choices=(1, 2))) == "one of 1, 2"
