"""Codes of categorical variables, for what can read numbers alone: an indicator for every category."""

from dataclasses import replace

import torch
from torch import Tensor

from draf_dist.schema.batch import Batch, ModalityInput, SeriesInput
from draf_dist.schema.modality import DataSchema, ModalitySpec, SeriesSpec, TableSpec, VariableSpec


def category_counts(spec: ModalitySpec) -> dict[str, int]:
    """Categorical variable -> how many categories it has, in the order of the variables; none where there is no table."""
    return {one.name: len(one.categories) for one in spec.variables if one.categories} if isinstance(spec, TableSpec) else {}


def num_numbers(spec: SeriesSpec | TableSpec) -> int:
    """How many columns `as_numbers` gives."""
    return len(spec.variables) + sum(count - 1 for count in category_counts(spec).values())


def as_numbers(spec: ModalitySpec, value: ModalityInput) -> ModalityInput:
    """A table with each column of n codes as n columns that are 1 for the code and else 0; anything else as it is.

    The indicators stand where the codes stood. They are observed where the code was, and 0 elsewhere.
    """
    if not category_counts(spec):
        return value
    assert isinstance(spec, TableSpec)
    assert isinstance(value, SeriesInput)
    parts = [_columns(variable, value, at) for at, variable in enumerate(spec.variables)]
    values, observed = (torch.cat([part[which] for part in parts], dim=-1) for which in (0, 1))
    return SeriesInput(values, observed, value.length)


def batch_as_numbers(schema: DataSchema, batch: Batch) -> Batch:
    """The batch with every modality through `as_numbers`."""
    return replace(batch, inputs={spec.name: as_numbers(spec, batch.inputs[spec.name]) for spec in schema.modalities})


def _columns(variable: VariableSpec, table: SeriesInput, at: int) -> tuple[Tensor, Tensor]:
    """One variable, (B, 1, n) or (B, 1, 1), and what of it was observed."""
    values, observed = table.values[..., at : at + 1], table.observed[..., at : at + 1]
    if not variable.categories:
        return values, observed
    codes = torch.arange(len(variable.categories), device=values.device)
    return ((values == codes) & observed).to(values.dtype), observed.expand(*observed.shape[:-1], len(codes))
