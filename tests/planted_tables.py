"""Tables whose class is planted: what a fusion model should learn from each is known, and which of them was corrupted."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from model_inputs import pass_keys, variables
from torch import Tensor, nn

from draf_dist.models.encoders import EncoderChoice, TabularConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.batch import Batch, ClassTarget, SeriesInput
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, TableSpec

NAMES = ("first", "second", "third")
WIDTH = 6
TABLES = EncoderChoice(table=TabularConfig(hidden=32))
SCHEMA = DataSchema(
    modalities=tuple(TableSpec(name=name, variables=variables(WIDTH)) for name in NAMES),
    label=LabelSpec(name="death", classes=("no", "yes")),
    sites=("north",),
)


def planted_batch(shifts: Sequence[float], *, rows: int, seed: int, corruption: float = 0.0, sigma: float = 4.0) -> Batch:
    """Every value is normal with mean +-shift of its table by class. A table is corrupted with this probability: sigma of noise."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (rows,), generator=generator)
    corrupted = torch.rand(rows, len(NAMES), generator=generator) < corruption
    sign = (2.0 * label - 1).unsqueeze(1)
    clean = [shift * sign + torch.randn(rows, WIDTH, generator=generator) for shift in shifts]
    noise = sigma * torch.randn(len(NAMES), rows, WIDTH, generator=generator)
    inputs = {
        name: table(values + noise[m] * corrupted[:, m : m + 1]) for m, (name, values) in enumerate(zip(NAMES, clean, strict=True))
    }
    nothing = torch.zeros(rows, len(NAMES))
    return Batch(
        modalities=NAMES,
        inputs=dict(inputs),
        present=torch.ones(rows, len(NAMES), dtype=torch.bool),
        corrupted=corrupted,
        severity=nothing,
        quality=nothing,
        quality_known=nothing.bool(),
        target=ClassTarget(label, torch.ones(rows, dtype=torch.bool)),
        site=torch.zeros(rows, dtype=torch.int64),
        uid=torch.arange(rows) + rows * seed,
        epoch=torch.zeros(rows, dtype=torch.int64),
        weight=torch.ones(rows),
    )


def table(values: Tensor) -> SeriesInput:
    """Rows (B, F) of which everything was observed."""
    observed = torch.ones_like(values, dtype=torch.bool).unsqueeze(1)
    return SeriesInput(values.unsqueeze(1), observed, torch.ones(values.shape[0], dtype=torch.int64))


def corrupt(batch: Batch, modality: str, sigma: float = 4.0) -> Batch:
    """The batch with noise on one table of every row."""
    values = batch.inputs[modality].values
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(99))
    return replace(batch, inputs=batch.inputs | {modality: replace(batch.inputs[modality], values=values + sigma * noise)})


def train(
    model: nn.Module, shifts: Sequence[float], *, steps: int, corruption: float = 0.0, rate: float = 3e-3, **lambdas: Any
) -> None:
    """On fresh rows in every step, so that nothing can be learned by heart."""
    train_on(
        model, lambda step: planted_batch(shifts, rows=128, seed=step, corruption=corruption), steps=steps, rate=rate, **lambdas
    )


def train_on(model: nn.Module, draw: Callable[[int], Batch], *, steps: int, rate: float = 3e-3, **lambdas: Any) -> None:
    """Adam on the batch of every step."""
    objective = FusionObjectiveConfig(**lambdas).build()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for step in range(steps):
        batch = draw(step)
        terms = objective(model, batch, pass_keys(batch, passes=1, seed=step))
        optimizer.zero_grad()
        torch.stack([term.scale * term.numerator / term.weight for term in terms.values()]).sum().backward()
        optimizer.step()
    model.eval()


def accuracy(model: nn.Module, batch: Batch, passes: int = 8) -> float:
    """Of the mean probability over passes."""
    with torch.no_grad():
        found = model(batch, pass_keys(batch, passes)).logits.softmax(-1).mean(0).argmax(-1)
    return float((found == batch.classes.label).float().mean())
