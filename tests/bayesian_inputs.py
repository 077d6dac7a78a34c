"""Images with a disc in them, in 2-D and 3-D, for tests of the Bayesian stage: the disc is the mask, its side is the class."""

from typing import Any

import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.schema.batch import Batch, ClassTarget, MultiLabelTarget, SegmentationTarget, SeriesInput, SurvivalTarget, Target
from draf_dist.schema.label import LabelSpec, MultiLabelSpec, SegmentationSpec, SurvivalSpec, TaskSpec
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, TableSpec, VariableSpec, VolumeSpec

MASK = SegmentationSpec(name="organ", modality="scan", structures=("background", "disc"))
SIDE_OF = LabelSpec(name="side", classes=("left", "right"))
FINDINGS = MultiLabelSpec(name="findings", labels=("right", "large", "bright"))
DEATH = SurvivalSpec(name="death", edges=(1.0, 2.0))
TASKS: dict[str, TaskSpec] = {task.name: task for task in (MASK, SIDE_OF, FINDINGS, DEATH)}


def schema_of(task: TaskSpec, dimensions: int = 2, side: int = 16, *, annotated: bool = False) -> DataSchema:
    """A scan, a table that the model does not read, and if asked for two more images that hold annotations."""
    names = ("scan", "expert", "body") if annotated else ("scan",)
    table = TableSpec(name="labs", variables=(VariableSpec(name="v0"),))
    return DataSchema(modalities=(*(_image(name, dimensions, side) for name in names), table), label=task, sites=("north",))


def _image(name: str, dimensions: int, side: int) -> ModalitySpec:
    if dimensions == 2:
        return ImageSpec(name=name, channels=1, height=side, width=side)
    sides = (side, side, side)
    return VolumeSpec(name=name, channels=1, spacing_mm=(1, 1, 1), shape=sides, chunk=sides)


def disc_batch(schema: DataSchema, rows: int = 6, *, seed: int = 0, noise_sd: float = 0.5, gaps: bool = True) -> Batch:
    """A normalised batch. gaps: a row in five has no scan, and a row in four no target."""
    generator = torch.Generator().manual_seed(seed)
    spec = schema.modalities[0]
    space = (spec.height, spec.width) if isinstance(spec, ImageSpec) else spec.delivered
    side, dimensions = space[0], len(space)
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(s)) for s in space], indexing="ij"))
    centre = side * (0.3 + 0.4 * torch.rand(rows, dimensions, generator=generator))
    radius = side * (0.12 + 0.13 * torch.rand(rows, generator=generator))
    distance = (grid - centre.view(rows, dimensions, *[1] * dimensions)).square().sum(1).sqrt()
    mask = (distance < radius.view(rows, *[1] * dimensions)).long()
    image = 2.0 * mask + noise_sd * torch.randn(mask.shape, generator=generator)
    number = torch.arange(rows)
    present = torch.ones(rows, len(schema.modalities), dtype=torch.bool)
    present[:, 0] = (number % 5 != 4) | (not gaps)
    right = centre[:, -1] > side / 2
    truth = torch.stack([right, radius > 0.185 * side, image.flatten(1).mean(1) > image.mean()], dim=1)
    body = (grid[0] >= side // 4).expand_as(mask)
    inputs: dict[str, Any] = {name: value.unsqueeze(1).float() for name, value in _images(schema, image, mask, body).items()}
    inputs["labs"] = _labs(rows)
    zeros = torch.zeros_like(present, dtype=torch.float32)
    return Batch(
        modalities=schema.names,
        inputs=inputs,
        present=present,
        corrupted=torch.zeros_like(present),
        severity=zeros,
        quality=zeros,
        quality_known=torch.zeros_like(present),
        target=target_of(schema.label, mask, truth, (number % 4 != 3) | (not gaps)),
        site=torch.zeros(rows, dtype=torch.int64),
        uid=100 + number + 1000 * seed,
        epoch=torch.zeros(rows, dtype=torch.int64),
        weight=torch.ones(rows),
    )


def target_of(task: TaskSpec, mask: Tensor, truth: Tensor, observed: Tensor) -> Target:
    match task:
        case SegmentationSpec():
            return SegmentationTarget(torch.where(observed.view(-1, *[1] * (mask.dim() - 1)), mask, 0), observed)
        case LabelSpec():
            return ClassTarget(torch.where(observed, truth[:, 0].long(), 0), observed)
        case MultiLabelSpec():
            known = observed[:, None] & torch.ones_like(truth)
            known[::3, 1] = False
            return MultiLabelTarget(truth & known, known)
    interval = truth.sum(1).clamp_max(2) * observed
    return SurvivalTarget(interval.float() + 0.5, truth[:, 2] & observed, interval, observed)


def model_keys(batch: Batch, passes: int = 2, seed: int = 0) -> Tensor:
    return noise.sample_keys(seed, "mc", batch.epoch, batch.uid, passes)


def _images(schema: DataSchema, image: Tensor, mask: Tensor, body: Tensor) -> dict[str, Tensor]:
    known = {"scan": image, "expert": mask.float(), "body": body.float()}
    return {name: known[name] for name in schema.names if name in known}


def _labs(rows: int) -> SeriesInput:
    ones = torch.ones(rows, 1, 1)
    return SeriesInput(ones, ones.bool(), torch.ones(rows, dtype=torch.int64))
