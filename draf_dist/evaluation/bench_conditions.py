"""What a benchmark does to the studies of a fold before they are predicted: the same for every system, seed and baseline."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from draf_dist import noise
from draf_dist.config.spec import Spec, fingerprint
from draf_dist.data.corruption import (
    CorruptedSplit,
    Corruptor,
    Missing,
    MissingNotAtRandom,
    Operation,
    Swap,
    TrainingCorruption,
)
from draf_dist.data.loader import SplitLoader
from draf_dist.data.normalise import Normaliser
from draf_dist.data.release import Release
from draf_dist.errors import SpecError, explain
from draf_dist.evaluation.predictions import Applied
from draf_dist.schema.batch import Batch, ModalityInput, SeriesInput
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.release import Split

Hits = Literal["all", "each", "half", "one"]
LEVEL_INDEX = 1


class BenchCondition(Spec):
    """One operation at one level. operation: its grid holds "unchanged" and the level. hits: which modalities that it fits.

    all: every one of them. half: each with probability 1/2. one: one of those that the study has. each: one after another, all
    studies under each, and a number is the mean over these. Who is hit is drawn by study: the same for all that are compared.
    """

    operation: Operation
    hits: Hits = "all"

    @model_validator(mode="after")
    def _one_level(self) -> Self:
        if len(self.operation.grid) != 2:
            raise ValueError(f"the grid of {self.operation.kind} needs two entries, unchanged and the level")
        if isinstance(self.operation, Missing | MissingNotAtRandom) and self.hits != "all":
            raise ValueError(f"{self.operation.kind} draws by itself what goes missing; leave `hits` at all")
        return self

    @property
    def identity(self) -> str:
        """What decides who is hit and how: 64 hex digits."""
        return fingerprint(self)

    @property
    def level(self) -> float:
        """Sigma, factor, quality or probability."""
        return float(self.operation.grid[LEVEL_INDEX])

    @property
    def only_removes(self) -> bool:
        """Whether the exact posterior of what is left is known: nothing was changed, and absence says nothing."""
        return isinstance(self.operation, Missing)

    def cases(self, schema: DataSchema) -> tuple[Applied, ...]:
        """What is predicted, and how it is stored.

        Raises:
            SpecError: the operation fits no modality.
        """
        fitting = self.fitting(schema)
        if not fitting:
            where, remedy = f"conditions: {self.operation.kind}", "Leave the condition out."
            raise SpecError(explain(where, expected="a modality that it fits", found="none", remedy=remedy))
        names = fitting if self.hits == "each" else (self.hits,)
        return tuple(Applied(self.operation.kind, LEVEL_INDEX, name) for name in names)

    def fitting(self, schema: DataSchema) -> tuple[str, ...]:
        """Names of the modalities that the operation fits."""
        operation = self.operation
        if isinstance(operation, Swap | Missing | MissingNotAtRandom):
            return schema.names
        return tuple(spec.name for spec in schema.modalities if operation.fits(spec))


class Disturbed:
    """A split of a release under any condition: normalised, every study once. Its clean studies are held in memory."""

    def __init__(self, release: Release, split: Split, normaliser: Normaliser, batch_size: int, *, seed: int) -> None:
        corruptor = Corruptor(TrainingCorruption(), normaliser, seed=seed)
        self._split = CorruptedSplit(SplitLoader(release, split, batch_size), corruptor, seed=seed)
        self._schema, self._seed = release.schema, seed
        self._clean = list(self._split.clean())

    def under(self, condition: BenchCondition) -> Iterator[tuple[Applied, Iterable[Batch]]]:
        """Every case of the condition with its batches.

        Raises:
            SpecError: the operation fits no modality.
            DataError: missing not at random, where all studies have one label.
        """
        for applied in condition.cases(self._schema):
            yield applied, self._batches(condition, applied)

    def _batches(self, condition: BenchCondition, applied: Applied) -> Iterable[Batch]:
        if condition.hits in ("all", "each"):
            return self._changed(condition, applied.modality if condition.hits == "each" else None)
        fits = torch.tensor([name in condition.fitting(self._schema) for name in self._schema.names])
        choose = half_of if condition.hits == "half" else one_of
        pairs = zip(self._clean, self._changed(condition, None), strict=True)
        return (mixed(clean, changed, choose(clean, fits, seed=self._seed)) for clean, changed in pairs)

    def _changed(self, condition: BenchCondition, modality: str | None) -> Iterable[Batch]:
        operation = condition.operation
        if isinstance(operation, Swap):
            return self._split.batches(operation, LEVEL_INDEX, modality)
        return (self._split.change(batch, operation, LEVEL_INDEX, modality) for batch in self._clean)


def half_of(batch: Batch, fits: Tensor, *, seed: int) -> Tensor:
    """Bool (B, M): each present modality of fits, bool (M,), with probability 1/2."""
    return (_draws(batch, "half", seed) < 0.5) & batch.present & fits


def one_of(batch: Batch, fits: Tensor, *, seed: int) -> Tensor:
    """Bool (B, M): one present modality of fits, bool (M,); none where a study has none of them."""
    possible = batch.present & fits
    chosen = torch.where(possible, _draws(batch, "one", seed), -1.0).argmax(dim=1, keepdim=True)
    return torch.zeros_like(possible).scatter(1, chosen, True) & possible


def mixed(clean: Batch, changed: Batch, chosen: Tensor) -> Batch:
    """The modalities of `changed` where chosen, bool (B, M), the others of `clean`: two batches of the same studies."""
    inputs = {
        name: _rows(chosen[:, column], changed.inputs[name], clean.inputs[name]) for column, name in enumerate(clean.modalities)
    }
    return replace(
        clean,
        inputs=inputs,
        corrupted=torch.where(chosen, changed.corrupted, clean.corrupted),
        severity=torch.where(chosen, changed.severity, clean.severity),
    )


def _draws(batch: Batch, purpose: str, seed: int) -> Tensor:
    keys = [noise.sample_keys(seed, f"bench/{name}/{purpose}", None, batch.uid, 1)[0] for name in batch.modalities]
    return torch.stack([noise.uniform(key, (1,))[:, 0] for key in keys], dim=1)


def _rows(chosen: Tensor, changed: ModalityInput, clean: ModalityInput) -> ModalityInput:
    if isinstance(changed, SeriesInput) and isinstance(clean, SeriesInput):
        pairs = ((changed.values, clean.values), (changed.observed, clean.observed), (changed.length, clean.length))
        return SeriesInput(*(_where(chosen, *pair) for pair in pairs))
    if isinstance(changed, Tensor) and isinstance(clean, Tensor):
        return _where(chosen, changed, clean)
    raise TypeError("an operation must return the type of input it was given")


def _where(chosen: Tensor, changed: Tensor, clean: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, *[1] * (clean.dim() - 1)), changed, clean)


def condition_file(name: str, condition: BenchCondition) -> str:
    """Where a cell keeps its predictions of the fold under a condition."""
    return f"predictions/ood@{name}-{condition.identity[:8]}.parquet"
