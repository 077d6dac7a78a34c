"""Corruption as training meets it, and one corruption at one severity as a sweep applies it.

Training law (spec 0.4): each present modality is corrupted with probability .5, operation and severity uniform over the
non-zero grid without its last entry, which is held out for tests. Everything is keyed by (seed, stream, source epoch, uid,
modality): a sample meets the same corruption in any batch, on any rank and in any thread.
"""

from dataclasses import replace
from typing import Annotated, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from draf_dist import noise
from draf_dist.config.spec import Spec
from draf_dist.data.corruption.missing import drop_at_random
from draf_dist.data.corruption.operations import (
    AnyOperation,
    Downsample,
    EhrMask,
    EhrNoise,
    GaussianNoise,
    InputOperation,
    Jpeg,
    Missing,
    MissingNotAtRandom,
    Scale,
    Swap,
    severity,
)
from draf_dist.data.normalise import Normaliser
from draf_dist.schema.batch import Batch, ModalityInput, SeriesInput
from draf_dist.schema.modality import ImageSpec, ModalitySpec


class TrainingCorruption(Spec):
    """What happens to the samples of a training run.

    probability: of a present modality to be corrupted. hold_out_last: the last grid entry of every operation is never trained
    on. modality_dropout: probability of a present modality to be dropped, at least one is kept.
    """

    probability: float = Field(0.5, ge=0, le=1)
    operations: tuple[Annotated[InputOperation, Field(discriminator="kind")], ...] = (
        GaussianNoise(),
        Downsample(),
        Jpeg(),
        EhrMask(),
        EhrNoise(),
    )
    hold_out_last: bool = True
    modality_dropout: float = Field(0.2, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = [operation.kind for operation in self.operations]
        if len(set(kinds)) != len(kinds):
            raise ValueError("an operation is listed twice")
        short = [operation.kind for operation in self.operations if self.num_levels(operation) < 1]
        if short:
            raise ValueError(f"nothing is left of the grid of {', '.join(short)} when its last entry is held out")
        return self

    def num_levels(self, operation: InputOperation) -> int:
        """Grid entries that training draws from: 1, 2, ... this number."""
        return len(operation.grid) - (2 if self.hold_out_last else 1)

    def operations_for(self, spec: ModalitySpec) -> tuple[InputOperation, ...]:
        """Those that fit a modality, in the order of the spec."""
        return tuple(operation for operation in self.operations if operation.fits(spec))

    def choose(self, spec: ModalitySpec, *, seed: int, epoch: Tensor, uid: Tensor) -> tuple[Tensor, Tensor]:
        """Which of `operations_for(spec)` each sample meets and at which grid index: both int64 (B,); index 0 is none."""
        operations = self.operations_for(spec)
        if not operations:
            return torch.zeros_like(uid), torch.zeros_like(uid)
        hit, which, level = noise.uniform(_keys(seed, spec.name, "choice", epoch, uid), (3,)).unbind(dim=1)
        operation = (which * len(operations)).long()
        num_levels = torch.tensor([self.num_levels(each) for each in operations], device=uid.device)[operation]
        return operation, torch.where(hit < self.probability, 1 + (level * num_levels).long(), 0)


class JpegHook:
    """JPEG corruption of training, in the decode thread: what `TrainingCorruption.choose` says, on the stored uint8 image."""

    def __init__(self, config: TrainingCorruption, images: tuple[ImageSpec, ...], operation: Jpeg, *, seed: int) -> None:
        self._config, self._operation, self._seed = config, operation, seed
        self._specs = images

    def levels(self, uid: Tensor, epoch: Tensor) -> dict[str, NDArray[np.int64]]:
        """Modality -> grid index of every sample, 0 where the image stays as it is."""
        result: dict[str, NDArray[np.int64]] = {}
        for spec in self._specs:
            which, level = self._config.choose(spec, seed=self._seed, epoch=epoch, uid=uid)
            mine = self._config.operations_for(spec).index(self._operation)
            result[spec.name] = torch.where(which == mine, level, 0).numpy()
        return result

    def change(self, image: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        """The image (C, H, W) at a grid index."""
        return self._operation.encode(image, index)

    def severity(self, index: int) -> float:
        """In [0, 1], for Batch.severity."""
        return severity(self._operation, index)


class Corruptor:
    """Corrupts normalised batches: by the training law, or one operation at one severity for a sweep.

    inputs: modalities that the training law acts on; None: all. The others are not read, or hold what is to be learned.
    """

    def __init__(
        self, config: TrainingCorruption, normaliser: Normaliser, *, seed: int, inputs: frozenset[str] | None = None
    ) -> None:
        self.config = config
        self.normaliser = normaliser
        self._seed = seed
        self._inputs = frozenset(normaliser.schema.names) if inputs is None else inputs

    def decode_hook(self) -> JpegHook | None:
        """For the loader of a training run: its share of the law, or None if JPEG is not trained on."""
        jpeg = next((operation for operation in self.config.operations if isinstance(operation, Jpeg)), None)
        specs = self.normaliser.schema.modalities
        images = tuple(spec for spec in specs if isinstance(spec, ImageSpec) and spec.name in self._inputs)
        return JpegHook(self.config, images, jpeg, seed=self._seed) if jpeg is not None and images else None

    def train(self, batch: Batch) -> Batch:
        """The batch under the training law; flags say what was applied, JPEG by the loader's hook included."""
        dropped = self.config.modality_dropout
        batch = drop_at_random(batch, dropped, seed=self._seed, epoch=batch.epoch, inputs=self._inputs)
        for column, spec in enumerate(self.normaliser.schema.modalities):
            if spec.name not in self._inputs:
                continue
            which, index = self.config.choose(spec, seed=self._seed, epoch=batch.epoch, uid=batch.uid)
            for number, operation in enumerate(self.config.operations_for(spec)):
                if not isinstance(operation, Jpeg):
                    mine = torch.where(which == number, index, 0)
                    batch = self._change(batch, column, operation, mine, batch.epoch, self._seed)
        return batch

    def apply(self, batch: Batch, operation: AnyOperation, index: int, *, modality: str | None = None, seed: int) -> Batch:
        """The batch with one operation at one grid index, keyed without an epoch; index 0 returns it unchanged.

        modality: the one that is hit; None hits all that the operation fits. Absent modalities and padding stay as they are.

        Raises:
            TypeError: for `Swap` and `MissingNotAtRandom`, which need the whole split: see `CorruptedSplit`.
            SpecError: the grid has no such index.
        """
        if isinstance(operation, Swap | MissingNotAtRandom):
            raise TypeError(f"{operation.kind} needs the whole split: use CorruptedSplit")
        severity(operation, index)
        if isinstance(operation, Missing):
            return drop_at_random(batch, operation.grid[index], seed=seed, epoch=None, modality=modality)
        indices = torch.full_like(batch.uid, index)
        for column, spec in enumerate(self.normaliser.schema.modalities):
            if operation.fits(spec) and modality in (None, spec.name):
                batch = self._change(batch, column, operation, indices, None, seed)
        return batch

    def _change(
        self, batch: Batch, column: int, operation: InputOperation, index: Tensor, epoch: Tensor | None, seed: int
    ) -> Batch:
        """Applies an operation to one modality in the rows that have it and whose index is not 0, and sets their flags."""
        rows = torch.nonzero(batch.present[:, column] & (batch.weight > 0) & (index > 0))[:, 0]
        if rows.numel() == 0:
            return batch
        spec = self.normaliser.schema.modalities[column]
        value = batch.inputs[spec.name]
        scale = Scale(spec, *self.normaliser.constants(spec.name, batch.severity), self.normaliser.categories(spec.name))
        keys = _keys(seed, spec.name, operation.kind, None if epoch is None else epoch[rows], batch.uid[rows])
        changed = operation.apply(_take(value, rows), index[rows], keys, scale)
        flags, severities = batch.corrupted.clone(), batch.severity.clone()
        flags[rows, column] = True
        severities[rows, column] = index[rows].float() / (len(operation.grid) - 1)
        return replace(batch, inputs={**batch.inputs, spec.name: _put(value, rows, changed)}, corrupted=flags, severity=severities)


def _keys(seed: int, modality: str, purpose: str, epoch: Tensor | None, uid: Tensor) -> Tensor:
    return noise.sample_keys(seed, f"corruption/{modality}/{purpose}", epoch, uid, 1)[0]


def _take(value: ModalityInput, rows: Tensor) -> ModalityInput:
    if isinstance(value, SeriesInput):
        return SeriesInput(value.values[rows], value.observed[rows], value.length[rows])
    return value[rows]


def _put(value: ModalityInput, rows: Tensor, changed: ModalityInput) -> ModalityInput:
    if isinstance(value, SeriesInput) and isinstance(changed, SeriesInput):
        observed = value.observed.index_copy(0, rows, changed.observed)
        return SeriesInput(value.values.index_copy(0, rows, changed.values), observed, value.length)
    if isinstance(value, Tensor) and isinstance(changed, Tensor):
        return value.index_copy(0, rows, changed)
    raise TypeError("an operation must return the type of input it was given")
