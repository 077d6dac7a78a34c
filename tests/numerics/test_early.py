"""Early fusion: the count of the spec, what stands where in the row of numbers, and that evaluation has no noise (spec 4.1)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_inputs import pass_keys, small_batch, small_schema, variables
from planted_tables import SCHEMA as TABLES
from planted_tables import accuracy, planted_batch, train
from torch import Tensor
from torch.nn import functional

from draf_dist.models.build import build_model
from draf_dist.models.fusion.early import EarlyConfig, EarlyFusion, shape_of
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, VolumeSpec

SCHEMA = small_schema()
BATCH = small_batch(SCHEMA)
VOLUME = VolumeSpec(name="ct", spacing_mm=(1, 1, 1), shape=(64, 96, 96), chunk=(32, 32, 32))
DAYS = SeriesSpec(name="vitals", variables=variables(76), num_steps=48, step_h=1.0)


def early(schema: DataSchema = SCHEMA, **options: Any) -> EarlyFusion:
    model = build_model(EarlyConfig.model_validate(options), schema, seed=0)
    assert isinstance(model, EarlyFusion)
    return model


def schema_of(*modalities: ModalitySpec, num_classes: int = 2) -> DataSchema:
    label = LabelSpec(name="death", classes=tuple(f"class{index}" for index in range(num_classes)))
    return DataSchema(modalities=modalities, label=label, sites=("north",))


def num_parameters(schema: DataSchema, **options: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in EarlyFusion(EarlyConfig.model_validate(options), schema).parameters())


def test_the_count_of_a_volume_of_16_cubed_and_two_days_of_76_variables_is_the_spec_s() -> None:
    assert num_parameters(schema_of(VOLUME, DAYS)) == 4_098_306


@pytest.mark.parametrize("num_classes", [2, 5])
def test_the_count_follows_the_formula(num_classes: int) -> None:
    image = ImageSpec(name="cxr", channels=3, height=100, width=20)
    inputs = 3 * 32 * 20 + 48 * 76 * 2 + 2
    expected = (inputs * 40 + 40) + (40 * 30 + 30) + (30 * num_classes + num_classes)
    assert num_parameters(schema_of(image, DAYS, num_classes=num_classes), hidden=(40, 30), observed_bits=True) == expected


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (ImageSpec(name="cxr", height=224, width=224), (1, 32, 32)),
        (ImageSpec(name="cxr", height=12, width=200), (1, 12, 32)),
        (VOLUME, (1, 16, 16, 16)),
        (VolumeSpec(name="ct", spacing_mm=(1, 1, 1), patch=(8, 40, 40), chunk=(8, 8, 8)), (1, 8, 16, 16)),
        (DAYS, (48, 76)),
    ],
)
def test_images_are_pooled_and_never_blown_up(spec: ModalitySpec, shape: tuple[int, ...]) -> None:
    assert shape_of(spec, EarlyConfig()) == shape


def test_the_row_holds_pooled_pixels_then_measured_values_then_presence() -> None:
    model = early(image_side=4)
    present = torch.tensor([[True, False, True]]).expand(8, 3)
    row = model.raw(replace(BATCH, present=present))
    image, labs = BATCH.inputs["cxr"], BATCH.inputs["labs"]
    assert isinstance(image, Tensor)
    assert not isinstance(labs, Tensor)
    torch.testing.assert_close(row[:, :16], image.view(8, 4, 3, 4, 3).mean((2, 4)).flatten(1))
    assert (row[:, 16:31] == 0).all()
    torch.testing.assert_close(row[:, 31:35], (labs.values * labs.observed)[:, 0])
    assert torch.equal(row[:, 35:], present.float())


def test_volumes_are_pooled_by_equal_blocks() -> None:
    schema = schema_of(VolumeSpec(name="ct", spacing_mm=(1, 1, 1), shape=(8, 4, 4), chunk=(4, 4, 4)))
    volume = torch.randn(8, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    batch = replace(BATCH, modalities=("ct",), inputs={"ct": volume}, present=torch.ones(8, 1, dtype=torch.bool))
    expected = volume.view(8, 2, 4, 2, 2, 2, 2).mean((2, 4, 6)).flatten(1)
    torch.testing.assert_close(early(schema, volume_side=2).raw(batch)[:, :-1], expected)


def test_observed_bits_tell_a_zero_from_nothing() -> None:
    labs = BATCH.inputs["labs"]
    zeros = replace(labs, values=torch.zeros_like(labs.values))
    present = torch.ones_like(BATCH.present)
    seen = replace(BATCH, present=present, inputs=BATCH.inputs | {"labs": replace(zeros, observed=torch.ones_like(labs.observed))})
    unseen = replace(
        BATCH, present=present, inputs=BATCH.inputs | {"labs": replace(zeros, observed=torch.zeros_like(labs.observed))}
    )
    for observed_bits in (False, True):
        model = early(observed_bits=observed_bits)
        assert torch.equal(model.raw(seen), model.raw(unseen)) is not observed_bits


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    model = early().eval()
    first, again = model(BATCH, pass_keys(BATCH)).logits, model(BATCH, pass_keys(BATCH, seed=1)).logits
    assert torch.equal(first, again)
    assert torch.equal(first[0], first[3])
    sampled = model.train()(BATCH, pass_keys(BATCH)).logits
    assert not torch.equal(sampled[0], sampled[3])
    assert torch.equal(sampled, model(BATCH, pass_keys(BATCH)).logits)


def test_training_drops_three_tenths_and_scales_up_the_rest() -> None:
    """With one hidden layer its pre-activations are exact: logits of many passes average to those without dropout."""
    model = early(hidden=(64,))
    expected = model.eval()(BATCH, pass_keys(BATCH, passes=1)).logits[0]
    sampled = model.train()(BATCH, pass_keys(BATCH, passes=4000)).logits
    error = sampled.std(0) / 4000**0.5
    assert ((sampled.mean(0) - expected).abs() < 5 * error).all()
    hidden = functional.relu(model.layers[0](model.raw(BATCH)))
    kept = 0.7
    variance = (1 - kept) / kept * hidden.square() @ model.output.weight.square().T
    torch.testing.assert_close(sampled.var(0), variance, rtol=0.15, atol=0)


def test_a_presence_bit_alone_changes_the_output() -> None:
    """Zeros that were measured against nothing measured: the rest of the row is the same."""
    inputs = {name: value for name, value in BATCH.inputs.items() if name != "cxr"} | {"cxr": torch.zeros(8, 1, 12, 12)}
    with_it = replace(BATCH, inputs=inputs, present=torch.ones(8, 3, dtype=torch.bool))
    without = replace(with_it, present=torch.tensor([[False, True, True]]).expand(8, 3))
    model = early().eval()
    assert torch.equal(model.raw(with_it)[:, :-3], model.raw(without)[:, :-3])
    assert not torch.allclose(model(with_it, pass_keys(BATCH)).logits, model(without, pass_keys(BATCH)).logits)


def test_a_separable_set_is_fitted() -> None:
    model = early(TABLES, hidden=(32, 16))
    train(model, (1.5, 1.5, 1.5), steps=100)
    assert accuracy(model, planted_batch((1.5, 1.5, 1.5), rows=500, seed=10_000), passes=1) > 0.99
