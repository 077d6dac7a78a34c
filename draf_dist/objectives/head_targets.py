"""What heads besides the label learn from: masks that the release holds as images, and which structures a mask shows."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from draf_dist.errors import SpecError, explain, together
from draf_dist.objectives.annotations import check_annotation, mask_annotation
from draf_dist.objectives.bayesian import HeadTarget
from draf_dist.schema.batch import Batch, MultiLabelTarget, SegmentationTarget
from draf_dist.schema.label import MultiLabelSpec, SegmentationSpec, TaskSpec
from draf_dist.schema.modality import DataSchema


@dataclass(frozen=True)
class MaskOfImage:
    """The masks of two structures that a modality holds as images; rows without one, or with one of a single value, are unknown."""

    modality: str

    def __call__(self, batch: Batch) -> SegmentationTarget:
        """The masks of a batch."""
        shown, known = mask_annotation(batch, self.modality)
        return SegmentationTarget(shown.long(), known)


@dataclass(frozen=True)
class Occurrence:
    """Which structures stand in the mask of the label; structures: their places in it."""

    structures: tuple[int, ...]

    def __call__(self, batch: Batch) -> MultiLabelTarget:
        """One label a structure, known where the mask is."""
        target = batch.target
        assert isinstance(target, SegmentationTarget)  # the schema says so
        found = torch.stack([(target.mask == each).flatten(1).any(1) for each in self.structures], dim=1)
        known = target.observed[:, None].expand_as(found)
        return MultiLabelTarget(found & known, known)


def head_targets(heads: Mapping[str, TaskSpec], schema: DataSchema, masks: Mapping[str, str]) -> dict[str, HeadTarget]:
    """The targets of all heads besides the label, by name; masks: head -> modality that holds its masks.

    Raises:
        SpecError: one line for every head that nothing could teach, and for every mask that is not there or of no head.
    """
    found: dict[str, HeadTarget] = {}
    problems = [_no_such_head(name, tuple(heads)) for name in masks if name not in heads]
    for name, task in heads.items():
        try:
            found[name] = _target(name, task, schema, masks.get(name))
        except SpecError as error:
            problems.append(str(error))
    if problems:
        raise SpecError(together(problems))
    return found


def _target(head: str, task: TaskSpec, schema: DataSchema, mask: str | None) -> MaskOfImage | Occurrence:
    if isinstance(task, SegmentationSpec):
        if len(task.structures) != 2:
            remedy = "More can't be told from each other once images are normalised: give the release a mask for its label."
            raise SpecError(explain(f"model.heads.{head}", expected="2 structures", found=str(len(task.structures)), remedy=remedy))
        return MaskOfImage(check_annotation(f"objective.head_masks.{head}", mask, task.modality, schema))
    structures = schema.label.structures if isinstance(schema.label, SegmentationSpec) else ()
    if isinstance(task, MultiLabelSpec) and set(task.labels) <= set(structures):
        return Occurrence(tuple(structures.index(name) for name in task.labels))
    expected = f"labels among {', '.join(structures)}" if structures else "masks of an image"
    remedy = "A release has one label; a head besides it learns masks that a modality holds, or which structures of a mask occur."
    raise SpecError(explain(f"model.heads.{head}", expected=expected, found=", ".join(task.outputs), remedy=remedy))


def _no_such_head(name: str, known: tuple[str, ...]) -> str:
    remedy = f"Known: {', '.join(known)}." if known else "The model has none: see model.heads."
    return explain(f"objective.head_masks.{name}", expected="a head of the model", found="none of this name", remedy=remedy)
