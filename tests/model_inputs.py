"""Small schemas and batches for tests of models: one modality of each kind, every flag in use."""

from dataclasses import replace

import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.models.encoders import EncoderChoice, Image2dConfig, SeriesTransformerConfig, TabularConfig
from draf_dist.schema.batch import Batch, ClassTarget, ModalityInput, SeriesInput
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, ImageSpec, SeriesSpec, TableSpec, VariableSpec
from draf_dist.schema.release import ImageStats, ReleaseStats, VariableStats

SMALL_ENCODERS = EncoderChoice(
    image=Image2dConfig(widths=(4, 8), groups=2),
    series=SeriesTransformerConfig(hidden=8, heads=2),
    table=TabularConfig(hidden=16),
)


def variables(count: int) -> tuple[VariableSpec, ...]:
    return tuple(VariableSpec(name=f"v{index}", unit="1") for index in range(count))


def small_schema(num_classes: int = 2) -> DataSchema:
    return DataSchema(
        modalities=(
            ImageSpec(name="cxr", channels=1, height=12, width=12),
            SeriesSpec(name="vitals", variables=variables(3), num_steps=5, step_h=1.0),
            TableSpec(name="labs", variables=variables(4)),
        ),
        label=LabelSpec(name="death", classes=tuple(f"class{index}" for index in range(num_classes))),
        sites=("north", "south"),
    )


def small_stats() -> ReleaseStats:
    variable = VariableStats(mean=0.0, std=1.0, num_observed=10)
    return ReleaseStats(
        images={"cxr": ImageStats(mean=100.0, std=50.0, num_images=10)},
        variables={"vitals": (variable,) * 3, "labs": (variable,) * 4},
    )


def small_batch(schema: DataSchema, rows: int = 8, seed: int = 0) -> Batch:
    """A normalised batch in which about a third of the modalities is absent, none of a row entirely."""
    generator = torch.Generator().manual_seed(seed)
    modalities = len(schema.modalities)

    def chance(probability: float) -> Tensor:
        return torch.rand(rows, modalities, generator=generator) < probability

    present = chance(0.6)
    present[torch.arange(rows), torch.arange(rows) % modalities] = True
    return Batch(
        modalities=schema.names,
        inputs={spec.name: _values(spec, rows, generator) for spec in schema.modalities},
        present=present,
        corrupted=chance(0.5) & present,
        severity=torch.zeros(rows, modalities),
        quality=torch.zeros(rows, modalities),
        quality_known=torch.zeros(rows, modalities, dtype=torch.bool),
        target=ClassTarget(torch.randint(0, schema.num_outputs, (rows,), generator=generator), torch.ones(rows, dtype=torch.bool)),
        site=torch.zeros(rows, dtype=torch.int64),
        uid=torch.arange(100, 100 + rows),
        epoch=torch.zeros(rows, dtype=torch.int64),
        weight=torch.ones(rows),
    )


def _values(spec: object, rows: int, generator: torch.Generator) -> ModalityInput:
    if isinstance(spec, ImageSpec):
        return torch.randn(rows, spec.channels, spec.height, spec.width, generator=generator)
    assert isinstance(spec, SeriesSpec | TableSpec)
    steps = spec.num_steps if isinstance(spec, SeriesSpec) else 1
    values = torch.randn(rows, steps, len(spec.variables), generator=generator)
    observed = torch.rand(values.shape, generator=generator) < 0.8
    length = torch.randint(1, steps + 1, (rows,), generator=generator)
    return SeriesInput(values, observed, length)


def pass_keys(batch: Batch, passes: int = 4, seed: int = 0) -> Tensor:
    return noise.sample_keys(seed, "model", None, batch.uid, passes)


def with_absent_slots(batch: Batch, filler: float) -> Batch:
    """The batch with whatever was not measured overwritten: absent modalities, values not observed, steps past the length."""
    inputs = {}
    for axis, name in enumerate(batch.modalities):
        absent = ~batch.present[:, axis]
        value = batch.inputs[name]
        if isinstance(value, Tensor):
            inputs[name] = torch.where(absent.view(-1, 1, 1, 1), filler, value)
            continue
        past = torch.arange(value.values.shape[1]) >= value.length.unsqueeze(1)
        unused = absent.view(-1, 1, 1) | past.unsqueeze(2) | ~value.observed
        observed = torch.where(absent.view(-1, 1, 1) | past.unsqueeze(2), True, value.observed)
        length = torch.where(absent, 10_000, value.length)
        inputs[name] = SeriesInput(torch.where(unused, filler, value.values), observed, length)
    return replace(batch, inputs=inputs)
