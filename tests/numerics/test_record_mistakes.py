"""Signs and units of records that are wrong: what becomes of a number, what stays, and that only the row itself matters."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from draf_dist import noise
from draf_dist.data.corruption import SignFlip, TrainingCorruption, UnitError
from draf_dist.data.corruption.operations import Scale
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.modality import ImageSpec, TableSpec, VariableSpec

ROWS, STEPS = 200, 1
VARIABLES = (
    VariableSpec(name="glucose", unit="mg/dL"),
    VariableSpec.categorical("rhythm", ("sinus", "paced", "other")),
    VariableSpec(name="ventilated", type="binary"),
    VariableSpec(name="temperature", unit="degC"),
)
SPEC = TableSpec(name="chart", variables=VARIABLES)
SCALE = Scale(SPEC, torch.tensor([140.0, 0.0, 0.0, 37.0]), torch.tensor([60.0, 1.0, 1.0, 0.8]))
KEYS = noise.sample_keys(0, "mistakes", None, torch.arange(ROWS), 1)[0]
NUMERIC = torch.tensor([True, False, False, True])
RAW = torch.tensor([140.0, 1.0, 1.0, 37.0]) * (1 + 0.1 * noise.normal(KEYS, (STEPS, 4)))
MISTAKES = (SignFlip(), UnitError(), UnitError(grid=(1, 0.1, 18.0)))


def clean() -> SeriesInput:
    raw = torch.where(NUMERIC, RAW, RAW.round().clamp(0, 2))
    observed = noise.uniform(noise.chain(1, KEYS), (STEPS, 4)) < 0.7
    standard = torch.where(observed, (raw - SCALE.mean) / SCALE.std, 0.0)
    return SeriesInput(standard, observed, torch.full((ROWS,), STEPS))


def applied(operation: SignFlip | UnitError, index: int | Tensor) -> SeriesInput:
    levels = torch.full((ROWS,), index) if isinstance(index, int) else index
    changed = operation.apply(clean(), levels, KEYS, SCALE)
    assert isinstance(changed, SeriesInput)
    return changed


def hit(series: SeriesInput) -> Tensor:
    return series.observed & NUMERIC


@pytest.mark.parametrize("factor", [0.1, 18.0])
def test_the_wrong_unit_multiplies_the_raw_value(factor: float) -> None:
    """Standardisation undone, the observed numbers are the stored ones times the factor."""
    changed = applied(UnitError(grid=(1, factor)), 1)
    raw = changed.values * SCALE.std + SCALE.mean
    torch.testing.assert_close(raw[hit(changed)], factor * RAW[hit(changed)], rtol=1e-5, atol=1e-4)


def test_a_mean_patient_in_the_wrong_unit_is_as_far_off_as_the_mean_is_from_zero() -> None:
    """At z = 0 nine means in standard deviations: 9 * 37 / .8 of temperature, 9 * 140 / 60 of glucose."""
    zero = SeriesInput(torch.zeros(1, STEPS, 4), torch.ones(1, STEPS, 4, dtype=torch.bool), torch.tensor([STEPS]))
    changed = UnitError().apply(zero, torch.ones(1, dtype=torch.int64), KEYS[:1], SCALE)
    assert isinstance(changed, SeriesInput)
    torch.testing.assert_close(changed.values[0, 0], torch.tensor([21.0, 0.0, 0.0, 416.25]))


def test_there_and_back_is_the_clean_value() -> None:
    assert torch.equal(SignFlip().apply(applied(SignFlip(), 1), torch.ones(ROWS).long(), KEYS, SCALE).values, clean().values)
    back = UnitError(grid=(1, 0.1)).apply(applied(UnitError(), 1), torch.ones(ROWS).long(), KEYS, SCALE)
    torch.testing.assert_close(back.values, clean().values, rtol=1e-4, atol=1e-3)


def test_a_turned_sign_is_as_far_on_the_other_side_of_the_training_mean() -> None:
    changed, before = applied(SignFlip(), 1), clean()
    assert torch.equal(changed.values[hit(before)], -before.values[hit(before)])
    raw = changed.values * SCALE.std + SCALE.mean
    torch.testing.assert_close(raw[hit(before)], (2 * SCALE.mean - RAW)[hit(before)], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("operation", MISTAKES, ids=lambda op: f"{op.kind}-{len(op.grid)}")
def test_binary_values_codes_and_what_was_not_observed_stay(operation: SignFlip | UnitError) -> None:
    before, after = clean(), applied(operation, len(operation.grid) - 1)
    assert torch.equal(after.values[~hit(before)], before.values[~hit(before)])
    assert torch.equal(after.observed, before.observed)
    assert torch.equal(after.length, before.length)
    assert (after.values != before.values)[hit(before)].all()


@pytest.mark.parametrize("operation", MISTAKES, ids=lambda op: f"{op.kind}-{len(op.grid)}")
def test_a_row_is_changed_by_its_own_level_alone(operation: SignFlip | UnitError) -> None:
    levels = torch.arange(ROWS) % len(operation.grid)
    mixed = applied(operation, levels)
    for index in range(len(operation.grid)):
        assert torch.equal(mixed.values[levels == index], applied(operation, index).values[levels == index])
    assert torch.equal(applied(operation, 0).values, clean().values)


@pytest.mark.parametrize("operation", [SignFlip(), UnitError()], ids=lambda op: op.kind)
def test_what_has_no_numbers_has_neither_sign_nor_unit(operation: SignFlip | UnitError) -> None:
    assert operation.fits(SPEC)
    assert not operation.fits(TableSpec(name="codes", variables=VARIABLES[1:3]))
    assert not operation.fits(ImageSpec(name="cxr", height=16, width=16))


def test_a_law_can_train_on_both_and_refuses_what_is_no_level() -> None:
    law = {"operations": [{"kind": "sign_flip"}, {"kind": "unit_error", "grid": [1, 0.1, 10]}], "hold_out_last": False}
    found = TrainingCorruption.model_validate(law)
    assert found.operations == (SignFlip(), UnitError(grid=(1.0, 0.1, 10.0)))
    assert TrainingCorruption.model_validate(found.model_dump(mode="json")) == found
    with pytest.raises(ValidationError, match="nothing is left of the grid of sign_flip"):
        TrainingCorruption.model_validate(law | {"hold_out_last": True})
    for kind, grid in (("sign_flip", [0, 0.5]), ("sign_flip", [0, 1, 2]), ("unit_error", [0, 10]), ("unit_error", [1, -10])):
        with pytest.raises(ValidationError):
            TrainingCorruption.model_validate(law | {"operations": [{"kind": kind, "grid": grid}]})
