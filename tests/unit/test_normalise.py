"""Normalisation: z-scores where observed, 0 elsewhere, whatever an absent slot holds."""

import pytest
import torch

from draf_dist.data.normalise import Normaliser
from draf_dist.errors import SpecError
from draf_dist.schema.batch import Batch, ClassTarget, SeriesInput
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, ImageSpec, SeriesSpec, TableSpec, VariableSpec
from draf_dist.schema.release import ImageStats, ReleaseStats, VariableStats

SCHEMA = DataSchema(
    modalities=(
        ImageSpec(name="cxr", height=8, width=8),
        SeriesSpec(name="vitals", variables=(VariableSpec(name="hr"), VariableSpec(name="flat")), num_steps=3, step_h=1),
        TableSpec(name="history", variables=(VariableSpec(name="age"), VariableSpec(name="copd", type="binary"))),
    ),
    label=LabelSpec(name="death", classes=("no", "yes")),
    sites=("a",),
)
STATS = ReleaseStats(
    images={"cxr": ImageStats(mean=100.0, std=50.0, num_images=9)},
    variables={
        "vitals": (VariableStats(mean=80.0, std=10.0, num_observed=9), VariableStats(mean=4.0, std=0.0, num_observed=9)),
        "history": (VariableStats(mean=60.0, std=20.0, num_observed=9), VariableStats(mean=0.0, std=1.0, num_observed=9)),
    },
)


def batch(present: list[list[bool]]) -> Batch:
    rows = len(present)
    zeros = torch.zeros(rows, 3)
    vitals = torch.tensor([[90.0, 4.0], [70.0, 5.0], [float("nan"), 4.0]]).expand(rows, 3, 2).clone()
    return Batch(
        modalities=SCHEMA.names,
        inputs={
            "cxr": torch.full((rows, 1, 8, 8), 200, dtype=torch.uint8),
            "vitals": SeriesInput(vitals, ~torch.isnan(vitals), torch.full((rows,), 3)),
            "history": SeriesInput(
                torch.tensor([[[40.0, 1.0]]]).repeat(rows, 1, 1), torch.ones(rows, 1, 2, dtype=torch.bool), torch.ones(rows).long()
            ),
        },
        present=torch.tensor(present),
        corrupted=zeros.bool(),
        severity=zeros,
        quality=zeros,
        quality_known=zeros.bool(),
        target=ClassTarget(torch.zeros(rows).long(), torch.ones(rows).bool()),
        site=torch.zeros(rows).long(),
        uid=torch.arange(rows),
        epoch=torch.zeros(rows).long(),
        weight=torch.ones(rows),
    )


def test_images_and_numbers_become_z_scores_and_binary_variables_stay() -> None:
    result = Normaliser(SCHEMA, STATS)(batch([[True, True, True]]))
    assert torch.equal(result.inputs["cxr"], torch.full((1, 1, 8, 8), 2.0))
    # (90 - 80) / 10, (70 - 80) / 10, not observed; a variable that never varied keeps its plain difference.
    assert torch.equal(result.inputs["vitals"].values, torch.tensor([[[1.0, 0.0], [-1.0, 1.0], [0.0, 0.0]]]))
    assert torch.equal(result.inputs["history"].values, torch.tensor([[[-1.0, 1.0]]]))


def test_what_is_not_observed_is_zero_and_says_so() -> None:
    vitals = Normaliser(SCHEMA, STATS)(batch([[True, True, True]])).inputs["vitals"]
    assert vitals.observed.tolist() == [[[True, True], [True, True], [False, True]]]
    assert vitals.values[0, 2, 0] == 0


def test_an_absent_slot_may_hold_anything() -> None:
    clean = batch([[False, False, False], [True, True, True]])
    spoiled = {
        "cxr": clean.inputs["cxr"].float().index_fill(0, torch.tensor([0]), float("nan")),
        "vitals": SeriesInput(torch.full((2, 3, 2), float("nan")), torch.ones(2, 3, 2, dtype=torch.bool), torch.full((2,), 3)),
        "history": clean.inputs["history"],
    }
    spoiled["vitals"].values[1] = 80.0
    result = Normaliser(SCHEMA, STATS)(Batch(**{**vars(clean), "inputs": spoiled}))
    assert torch.equal(result.inputs["cxr"][0], torch.zeros(1, 8, 8))
    assert torch.equal(result.inputs["vitals"].values[0], torch.zeros(3, 2))
    assert not result.inputs["vitals"].observed[0].any()
    assert result.inputs["vitals"].length.tolist() == [0, 3]
    assert all(
        torch.isfinite(x).all() for x in (result.inputs["cxr"], result.inputs["vitals"].values, result.inputs["history"].values)
    )


def test_statistics_of_another_schema_are_refused() -> None:
    fewer = ReleaseStats(images=STATS.images, variables={**STATS.variables, "vitals": STATS.variables["vitals"][:1]})
    with pytest.raises(SpecError, match=r"stats.json: vitals.*found 1 variables"):
        Normaliser(SCHEMA, fewer)
    with pytest.raises(SpecError, match=r"stats.json: cxr.*no statistics"):
        Normaliser(SCHEMA, ReleaseStats(images={}, variables=STATS.variables))
