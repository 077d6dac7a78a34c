"""Small normalised batches of an image, a series and a table, and what corrupts them."""

import torch
from batches import tensors
from torch import Tensor

from draf_dist import noise
from draf_dist.data.corruption import (
    Corruptor,
    Downsample,
    EhrMask,
    EhrNoise,
    GaussianNoise,
    Jpeg,
    SignFlip,
    TrainingCorruption,
    UnitError,
)
from draf_dist.data.normalise import Normaliser
from draf_dist.schema.batch import Batch, ClassTarget, SeriesInput
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, ImageSpec, SeriesSpec, TableSpec, VariableSpec
from draf_dist.schema.release import ImageStats, ReleaseStats, VariableStats

SEED = 7
UNIT = VariableStats(mean=0.0, std=1.0, num_observed=1)
SCHEMA = DataSchema(
    modalities=(
        ImageSpec(name="cxr", height=16, width=16),
        SeriesSpec(name="vitals", variables=tuple(VariableSpec(name=n) for n in "abc"), num_steps=6, step_h=1),
        TableSpec(name="history", variables=(VariableSpec(name="age"), VariableSpec(name="copd", type="binary"))),
    ),
    label=LabelSpec(name="death", classes=("no", "yes")),
    sites=("a",),
)
NORMALISER = Normaliser(
    SCHEMA,
    ReleaseStats(
        images={"cxr": ImageStats(mean=120.0, std=60.0, num_images=1)}, variables={"vitals": (UNIT,) * 3, "history": (UNIT,) * 2}
    ),
)
OPERATIONS = (GaussianNoise(), Downsample(), Jpeg(), EhrMask(), EhrNoise(), SignFlip(), UnitError())


def normalised(num_rows: int, *, all_present: bool = False, padding: int = 0) -> Batch:
    """A batch as the normaliser makes it; rows carry different content, by uid."""
    keys = noise.sample_keys(0, "content", None, torch.arange(num_rows), 1)[0]
    present = torch.ones(num_rows, 3, dtype=torch.bool) if all_present else noise.uniform(keys, (3,)) < 0.8
    present[:, 0] |= ~present.any(dim=1)
    weight = torch.ones(num_rows)
    weight[num_rows - padding :] = 0
    uid = torch.where(weight > 0, torch.arange(num_rows), -1)
    observed = noise.uniform(keys, (6, 3)) < 0.7
    stored = Batch(
        modalities=SCHEMA.names,
        inputs={
            "cxr": (noise.uniform(keys, (1, 16, 16)) * 255).to(torch.uint8),
            "vitals": SeriesInput(noise.normal(keys, (6, 3)), observed, torch.full((num_rows,), 6)),
            "history": SeriesInput(
                torch.ones(num_rows, 1, 2), torch.ones(num_rows, 1, 2, dtype=torch.bool), torch.ones(num_rows, dtype=torch.int64)
            ),
        },
        present=present,
        corrupted=torch.zeros(num_rows, 3, dtype=torch.bool),
        severity=torch.zeros(num_rows, 3),
        quality=torch.zeros(num_rows, 3),
        quality_known=torch.zeros(num_rows, 3, dtype=torch.bool),
        target=ClassTarget(torch.arange(num_rows) % 2, torch.ones(num_rows, dtype=torch.bool)),
        site=torch.zeros(num_rows, dtype=torch.int64),
        uid=uid,
        epoch=torch.arange(num_rows) % 3,
        weight=weight,
    )
    return NORMALISER(stored)


def join(parts: list[Batch]) -> list[Tensor]:
    return [torch.cat(pieces) for pieces in zip(*(tensors(part) for part in parts), strict=True)]


def corruptor(**config: object) -> Corruptor:
    return Corruptor(TrainingCorruption(**config), NORMALISER, seed=SEED)
