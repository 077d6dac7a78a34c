"""How often each outcome occurs among the labels that training may use."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.data.release import Release
from draf_dist.data.targets import target_rows
from draf_dist.errors import DataError, explain
from draf_dist.schema.batch import ClassTarget, MultiLabelTarget, SurvivalTarget
from draf_dist.schema.label_text import read_label
from draf_dist.schema.study import StudyLabel
from draf_dist.training.job import FinetuneJob


@dataclass(frozen=True)
class LabelCounts:
    """How often each of K outcomes held, of how many.

    held, of: int64 (K,). Of a class: its studies, of all; of a label: where it holds, of where it is known; of an interval: the
    events in it, of those who reached it.
    """

    held: Tensor
    of: Tensor


def has_label(job: FinetuneJob, uid: Tensor) -> Tensor:
    """Which studies, uid int64 (B,), keep their label: bool (B,). A larger fraction keeps all that a smaller one keeps."""
    return noise.uniform(noise.chain(job.seed, "label_fraction", uid), ()) < job.label_fraction


def count_labels(job: FinetuneJob, release: Release) -> LabelCounts:
    """The counts of the training split.

    Raises:
        DataError: the subjects table has a label that the schema does not have.
    """
    table = release.subjects()
    train = [row for row, split in enumerate(table["split"].to_pylist()) if split == "train"]
    texts, task = table["label"].to_pylist(), release.schema.label
    labels: dict[str, StudyLabel] = {}
    strange = 0
    for text in {texts[row] for row in train}:
        try:
            labels[text] = read_label(task, text)
        except ValueError:
            strange += 1
    if strange:
        expected, found = ", ".join(task.outputs), f"{strange} others"
        raise DataError(explain("subjects.parquet: label", expected=expected, found=found, remedy="Prepare again."))
    uid = torch.tensor([table["uid"][row].as_py() for row in train], dtype=torch.int64)
    kept = has_label(job, uid).tolist()
    return _counted(release, [labels[texts[row]] for row, keeps in zip(train, kept, strict=True) if keeps])


def _counted(release: Release, labels: Iterable[StudyLabel]) -> LabelCounts:
    labels = list(labels)
    rows = target_rows(release.schema.label, len(labels))
    for row, label in enumerate(labels):
        rows.set(row, label)
    match rows.target():
        case ClassTarget() as target:
            held = torch.bincount(target.label, minlength=release.schema.num_outputs)
            return LabelCounts(held, held.sum().expand_as(held))
        case MultiLabelTarget() as target:
            return LabelCounts(target.label.sum(0), target.observed.sum(0))
        case SurvivalTarget() as target:
            interval = torch.arange(release.schema.num_outputs)
            died = (target.interval[:, None] == interval) & target.event[:, None]
            # Who is censored in an interval is not known to have reached its end, and so is at risk up to the one before.
            at_risk = (target.interval[:, None] > interval) | died
            return LabelCounts(died.sum(0), at_risk.sum(0))
        case _:
            raise TypeError("a mask is no label of a study")
