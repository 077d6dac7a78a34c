"""The targets of a batch while it is filled, one kind for each kind of label."""

from typing import Protocol

import numpy as np
import torch

from draf_dist.data.arena import Arena
from draf_dist.data.decode import UndecodableError
from draf_dist.data.masks import mask_problem
from draf_dist.data.patches import Patch
from draf_dist.data.volumes import delivered_shape
from draf_dist.errors import SpecError, explain
from draf_dist.schema.batch import ClassTarget, MultiLabelTarget, SegmentationTarget, SurvivalTarget, Target
from draf_dist.schema.label import LabelSpec, MultiLabelSpec, SurvivalSpec, TaskSpec
from draf_dist.schema.modality import VolumeSpec
from draf_dist.schema.study import MaskLabel, StudyLabel, TimeToEvent


class TargetRows(Protocol):
    """Rows of a target, all of them unknown until they are set. Rows may be set by several threads at once, each by one."""

    def set(self, row: int, label: StudyLabel) -> None:
        """Gives a row the label of its study."""
        ...

    def clear(self, row: int) -> None:
        """Makes a row unknown, with 0 in it."""
        ...

    def target(self) -> Target:
        """The target, which shares the memory."""
        ...


def target_rows(task: TaskSpec, num_rows: int) -> TargetRows:
    """Rows for the labels of a task.

    Raises:
        SpecError: the labels of the task are masks, which come with their images.
    """
    match task:
        case LabelSpec():
            return _Classes(num_rows)
        case MultiLabelSpec():
            return _Labels(num_rows, len(task.labels))
        case SurvivalSpec():
            return _Times(num_rows, task)
        case _:
            remedy = "This part of the program reads classes, labels and times."
            raise SpecError(explain(f"label {task.name}", expected="a label of the study", found="a mask", remedy=remedy))


class _Classes:
    def __init__(self, num_rows: int) -> None:
        self.label = np.zeros(num_rows, dtype=np.int64)
        self.observed = np.zeros(num_rows, dtype=np.bool_)

    def set(self, row: int, label: StudyLabel) -> None:
        assert isinstance(label, int)
        self.label[row], self.observed[row] = label, True

    def clear(self, row: int) -> None:
        self.label[row], self.observed[row] = 0, False

    def target(self) -> Target:
        return ClassTarget(torch.from_numpy(self.label), torch.from_numpy(self.observed))


class _Labels:
    def __init__(self, num_rows: int, num_labels: int) -> None:
        self.label, self.observed = (np.zeros((num_rows, num_labels), dtype=np.bool_) for _ in range(2))

    def set(self, row: int, label: StudyLabel) -> None:
        assert isinstance(label, tuple)
        self.label[row] = [answer is True for answer in label]
        self.observed[row] = [answer is not None for answer in label]

    def clear(self, row: int) -> None:
        self.label[row], self.observed[row] = False, False

    def target(self) -> Target:
        return MultiLabelTarget(torch.from_numpy(self.label), torch.from_numpy(self.observed))


class _Times:
    def __init__(self, num_rows: int, task: SurvivalSpec) -> None:
        self.edges = np.array(task.edges)
        self.time = np.zeros(num_rows, dtype=np.float32)
        self.event, self.observed = (np.zeros(num_rows, dtype=np.bool_) for _ in range(2))
        self.interval = np.zeros(num_rows, dtype=np.int64)

    def set(self, row: int, label: StudyLabel) -> None:
        assert isinstance(label, TimeToEvent)
        self.time[row], self.event[row], self.observed[row] = label.time, label.event, True
        # An edge belongs to the interval that begins there. In double precision: rounded, a time could cross an edge.
        self.interval[row] = np.searchsorted(self.edges, label.time, side="right")

    def clear(self, row: int) -> None:
        self.time[row], self.event[row], self.interval[row], self.observed[row] = 0, False, 0, False

    def target(self) -> Target:
        return SurvivalTarget(*(torch.from_numpy(part) for part in (self.time, self.event, self.interval, self.observed)))


class MaskRows:
    """Masks of the patches that a batch holds, int64 (B, D, H, W); unknown until one is decoded into its row.

    spec: how masks are stored. A row has the memory of an earlier batch in it until it is decoded, set or cleared.
    """

    def __init__(self, spec: VolumeSpec, num_structures: int, num_rows: int, arena: Arena) -> None:
        self._shape, self._num_structures = delivered_shape(spec), num_structures
        self.mask, self._tensor = arena.take((num_rows, *self._shape[1:]), np.dtype(np.int64))
        self.observed = np.zeros(num_rows, dtype=np.bool_)

    def set(self, row: int, label: StudyLabel) -> None:
        """What the study's json says; `decode` is to follow where there is a mask."""
        assert isinstance(label, MaskLabel)
        self.observed[row] = label.drawn
        if not label.drawn:
            self.mask[row] = 0

    def decode(self, row: int, patch: Patch) -> None:
        """The mask of a row.

        Raises:
            UndecodableError: it is damaged, or holds what is no structure.
        """
        stored = np.empty(self._shape, dtype=np.int16)
        patch.decode(stored)
        if problem := mask_problem(stored, self._num_structures):
            raise UndecodableError(problem)
        self.mask[row] = stored[0]

    def clear(self, row: int) -> None:
        """Makes a row unknown, with 0 in it."""
        self.mask[row], self.observed[row] = 0, False

    def target(self) -> Target:
        """The target, which shares the memory."""
        return SegmentationTarget(self._tensor, torch.from_numpy(self.observed))
