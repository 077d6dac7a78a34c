"""How often each outcome occurs among the labels that training may use."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draf_dist.data.release import Release
from draf_dist.data.splits import StudyRow
from draf_dist.data.targets import target_rows
from draf_dist.errors import DataError, explain
from draf_dist.schema.batch import ClassTarget, MultiLabelTarget, SurvivalTarget
from draf_dist.schema.label import SegmentationSpec
from draf_dist.schema.label_text import read_label, stratum
from draf_dist.schema.study import MaskLabel, StudyLabel
from draf_dist.training.job import FinetuneJob
from draf_dist.training.label_fraction import HasLabel, labelled_studies


@dataclass(frozen=True)
class LabelCounts:
    """How often each of K outcomes held, of how many.

    held, of: int64 (K,). Of a class: its studies, of all; of a label: where it holds, of where it is known; of an interval: the
    events in it, of those who reached it; of a structure of a mask, which is not read here: 0, of all masks. num_studies: all
    whose label training may use. has_label: which studies keep theirs, if they have one.
    """

    held: Tensor
    of: Tensor
    num_studies: int
    has_label: HasLabel


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
    uid = table["uid"].take(train).to_pylist()
    subjects, sites = (table[name].take(train).to_pylist() for name in ("subject", "site"))
    known = [labels[texts[row]] for row in train]
    studies = [StudyRow(subject, site, stratum(label)) for subject, site, label in zip(subjects, sites, known, strict=True)]
    has_label = labelled_studies(job, zip(uid, studies, strict=True))
    kept = has_label(torch.tensor(uid, dtype=torch.int64)).tolist()
    used = [label for label, keeps in zip(known, kept, strict=True) if keeps and label != MaskLabel(drawn=False)]
    held, of = _counted(release, used)
    return LabelCounts(held, of, len(used), has_label)


def _counted(release: Release, labels: Sequence[StudyLabel]) -> tuple[Tensor, Tensor]:
    """How often each held, and of how many."""
    if isinstance(release.schema.label, SegmentationSpec):
        held = torch.zeros(release.schema.num_outputs, dtype=torch.int64)
        return held, held + len(labels)
    rows = target_rows(release.schema.label, len(labels))
    for row, label in enumerate(labels):
        rows.set(row, label)
    match rows.target():
        case ClassTarget() as target:
            held = torch.bincount(target.label, minlength=release.schema.num_outputs)
            return held, held.sum().expand_as(held)
        case MultiLabelTarget() as target:
            return target.label.sum(0), target.observed.sum(0)
        case SurvivalTarget() as target:
            interval = torch.arange(release.schema.num_outputs)
            died = (target.interval[:, None] == interval) & target.event[:, None]
            # Who is censored in an interval is not known to have reached its end, and so is at risk up to the one before.
            at_risk = (target.interval[:, None] > interval) | died
            return died.sum(0), at_risk.sum(0)
        case _:
            raise TypeError("a mask is counted by its studies")
