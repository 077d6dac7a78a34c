"""What a benchmark does to studies before they are predicted: who is hit, and that the rest stays as it was."""

from dataclasses import replace

import pytest
import torch
from batches import same, tensors
from model_inputs import small_batch, small_schema
from pydantic import ValidationError

from draf_dist.errors import SpecError
from draf_dist.evaluation.bench_conditions import BenchCondition, condition_file, half_of, mixed, one_of
from draf_dist.evaluation.predictions import Applied
from draf_dist.schema.batch import Batch, SeriesInput

SCHEMA = small_schema()
RECORDS = torch.tensor([False, True, True])
NOISE = {"kind": "ehr_noise", "grid": [0, 10]}


def condition(operation: dict[str, object], hits: str = "all") -> BenchCondition:
    return BenchCondition.model_validate({"operation": operation, "hits": hits})


def test_half_hits_half_of_what_is_present_and_fits() -> None:
    batch = small_batch(SCHEMA, rows=2000)
    chosen = half_of(batch, RECORDS, seed=0)
    possible = batch.present & RECORDS
    assert not (chosen & ~possible).any()
    share = chosen.sum(0)[1:] / possible.sum(0)[1:]
    assert share.tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    both = chosen[possible.sum(1) == 2].sum(1)
    # The two are drawn apart: a quarter of the studies with both has none hit, a quarter both.
    assert [float((both == k).float().mean()) for k in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.06)


def test_one_hits_one_of_what_is_present_and_fits_and_none_where_nothing_does() -> None:
    batch = small_batch(SCHEMA, rows=2000)
    chosen = one_of(batch, RECORDS, seed=0)
    possible = batch.present & RECORDS
    assert torch.equal(chosen.sum(1), possible.any(1).long())
    assert not (chosen & ~possible).any()
    with_both = chosen[possible.sum(1) == 2]
    assert float(with_both[:, 1].float().mean()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("choose", [half_of, one_of])
def test_who_is_hit_depends_on_the_study_and_the_seed_alone(choose: object) -> None:
    batch = small_batch(SCHEMA, rows=64)
    every = choose(batch, RECORDS, seed=3)
    some = batch.map(lambda tensor: tensor[[40, 7]])
    assert torch.equal(choose(some, RECORDS, seed=3), every[[40, 7]])
    assert not torch.equal(choose(batch, RECORDS, seed=4), every)


def test_what_is_not_chosen_stays_as_it_was_bit_for_bit() -> None:
    clean, changed = small_batch(SCHEMA), altered(small_batch(SCHEMA))
    nothing = torch.zeros_like(clean.present)
    assert same(mixed(clean, changed, nothing), clean)
    assert same(mixed(clean, changed, ~nothing), changed)
    chosen = nothing.clone()
    chosen[3, 1] = True
    found = mixed(clean, changed, chosen)
    vitals, series = found.inputs["vitals"], changed.inputs["vitals"]
    assert torch.equal(vitals.values[3], series.values[3])
    assert torch.equal(vitals.values[:3], clean.inputs["vitals"].values[:3])
    assert torch.equal(found.inputs["cxr"], clean.inputs["cxr"])
    assert (found.severity != clean.severity).nonzero().tolist() == [[3, 1]]


def altered(batch: Batch) -> Batch:
    inputs = {
        name: SeriesInput(value.values + 1, ~value.observed, value.length) if isinstance(value, SeriesInput) else value + 1
        for name, value in batch.inputs.items()
    }
    changed = replace(batch, inputs=inputs, severity=batch.severity + 1, corrupted=~batch.corrupted)
    assert all(not torch.equal(a, b) for a, b in zip(tensors(inputs["cxr"]), tensors(batch.inputs["cxr"]), strict=True))
    return changed


def test_each_is_a_case_for_every_modality_that_fits() -> None:
    assert condition(NOISE, "each").cases(SCHEMA) == (Applied("ehr_noise", 1, "vitals"), Applied("ehr_noise", 1, "labs"))
    assert condition(NOISE, "half").cases(SCHEMA) == (Applied("ehr_noise", 1, "half"),)
    assert condition({"kind": "sign_flip"}, "each").cases(SCHEMA) == (
        Applied("sign_flip", 1, "vitals"),
        Applied("sign_flip", 1, "labs"),
    )
    units = {"kind": "unit_error", "grid": [1, 10]}
    assert (condition(units).level, condition(units, "each").fitting(SCHEMA)) == (10.0, ("vitals", "labs"))
    assert [case.modality for case in condition({"kind": "swap"}, "each").cases(SCHEMA)] == ["cxr", "vitals", "labs"]


def test_an_operation_that_fits_nothing_is_refused() -> None:
    images = replace_modalities("cxr")
    with pytest.raises(SpecError, match="ehr_noise: expected a modality that it fits"):
        condition(NOISE).cases(images)


def replace_modalities(*names: str) -> object:
    return SCHEMA.model_copy(update={"modalities": tuple(spec for spec in SCHEMA.modalities if spec.name in names)})


@pytest.mark.parametrize(
    ("operation", "hits", "message"),
    [
        ({"kind": "ehr_noise"}, "all", "two entries, unchanged and the level"),
        ({"kind": "missing", "grid": [0, 0.5]}, "half", "draws by itself what goes missing"),
        ({"kind": "missing_not_at_random", "grid": [0, 0.3]}, "each", "draws by itself what goes missing"),
    ],
)
def test_what_is_no_condition_is_refused(operation: dict[str, object], hits: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        condition(operation, hits)


def test_another_level_or_another_choice_is_another_file() -> None:
    first = condition(NOISE, "one")
    files = {condition_file("noise", each) for each in (first, condition(NOISE), condition({**NOISE, "grid": [0, 3.2]}, "one"))}
    assert len(files) == 3
    assert condition_file("noise", first) == condition_file("noise", condition(NOISE, "one"))


def test_the_posterior_is_known_only_where_modalities_are_removed_at_random() -> None:
    assert condition({"kind": "missing", "grid": [0, 0.5]}).only_removes
    assert not condition({"kind": "missing_not_at_random", "grid": [0, 0.3]}).only_removes
    assert not condition(NOISE).only_removes
