"""Three tables of one hidden factor, for tests of what can be told from each alone and from how they go together."""

from dataclasses import replace

import torch
from model_inputs import variables
from torch import Tensor

from draf_dist import noise
from draf_dist.schema.batch import Batch, ClassTarget, SeriesInput
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, TableSpec

NAMES, WIDTH, FACTORS = ("labs", "ecg", "history"), 12, 4
VIEWS = DataSchema(
    modalities=tuple(TableSpec(name=name, variables=variables(WIDTH)) for name in NAMES),
    label=LabelSpec(name="death", classes=("no", "yes")),
    sites=("north", "south"),
)


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def planted(rows: int, seed: int) -> Batch:
    """Every view is a linear map of 4 factors of the subject, and a little noise; the label is the sign of the first factor."""
    factors = normal(rows, FACTORS, seed)
    inputs = {}
    for index, name in enumerate(NAMES):
        mixing = normal(FACTORS, WIDTH, 900 + index)
        values = (factors @ mixing + normal(rows, WIDTH, seed + 1 + index)) / (mixing.square().sum(0) + 1).sqrt()
        inputs[name] = table(values)
    shape = (rows, len(NAMES))
    nothing = torch.zeros(shape)
    return Batch(
        modalities=NAMES,
        inputs=inputs,
        present=torch.ones(shape, dtype=torch.bool),
        corrupted=nothing.bool(),
        severity=nothing,
        quality=nothing,
        quality_known=nothing.bool(),
        target=ClassTarget((factors[:, 0] > 0).long(), torch.ones(rows, dtype=torch.bool)),
        site=torch.zeros(rows, dtype=torch.int64),
        uid=torch.arange(rows) + 1_000_000 * seed,
        epoch=torch.zeros(rows, dtype=torch.int64),
        weight=torch.ones(rows),
    )


def table(values: Tensor) -> SeriesInput:
    steps = values.unsqueeze(1)
    return SeriesInput(steps, torch.ones_like(steps, dtype=torch.bool), torch.ones(len(values), dtype=torch.int64))


def noisy(batch: Batch, name: str, sigma: float) -> Batch:
    """One view under noise in all rows."""
    value = batch.inputs[name]
    assert isinstance(value, SeriesInput)
    draws = noise.normal(noise.chain("planted", batch.uid), tuple(value.values.shape[1:]))
    return replace(batch, inputs=batch.inputs | {name: replace(value, values=value.values + sigma * draws)})


def swapped(batch: Batch, name: str) -> Batch:
    """One view of the row before in place of one's own, in all rows."""
    value = batch.inputs[name]
    assert isinstance(value, SeriesInput)
    return replace(batch, inputs=batch.inputs | {name: table(value.values[:, 0].roll(1, 0))})
