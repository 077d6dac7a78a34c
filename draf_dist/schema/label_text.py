"""A study's label as it is stored: one short text, the same for the same label, that a reader understands."""

import math

from draf_dist.schema.label import LabelSpec, MultiLabelSpec, SegmentationSpec, SurvivalSpec, TaskSpec
from draf_dist.schema.study import MaskLabel, StudyLabel, TimeToEvent

_ANSWERS: dict[bool | None, str] = {False: "0", True: "1", None: "-"}
_READ = {text: answer for answer, text in _ANSWERS.items()}
_DRAWN, _NOT_DRAWN = "mask", "-"


def label_text(task: TaskSpec, label: StudyLabel) -> str:
    """A class by its name; labels as one of 0, 1 and - (unknown) each, in order; a time as 412.5, censored as 412.5+.

    Of a mask, which lies beside its image, `mask` or - (there is none).

    Raises:
        ValueError: the label does not fit the task; the text says how, and nothing of a subject but the label itself.
    """
    match task, label:
        case LabelSpec(), int():
            if not 0 <= label < len(task.classes):
                raise ValueError(f"class index {label} of {len(task.classes)} classes")
            return task.classes[label]
        case MultiLabelSpec(), tuple():
            if len(label) != len(task.labels):
                raise ValueError(f"{len(label)} answers to {len(task.labels)} labels")
            if all(answer is None for answer in label):
                raise ValueError("none of the labels is known")
            return "".join(_ANSWERS[answer] for answer in label)
        case SurvivalSpec(), TimeToEvent():
            if not (math.isfinite(label.time) and label.time >= 0):
                raise ValueError(f"a time of {label.time:g} {task.unit}")
            return f"{label.time!r}{'' if label.event else '+'}"
        case SegmentationSpec(), MaskLabel():
            return _DRAWN if label.drawn else _NOT_DRAWN
        case _:
            raise ValueError(f"a label of another kind than {task.name}")


def read_label(task: TaskSpec, text: str) -> StudyLabel:
    """The label of a text.

    Raises:
        ValueError: it is none that `label_text` writes for this task.
    """
    if isinstance(task, LabelSpec):
        return task.classes.index(text)
    label = _parsed(task, text)
    if label_text(task, label) != text:
        raise ValueError("not as it is written")
    return label


def stratum(label: StudyLabel) -> int:
    """What splits keep in proportion: the class; whether an event was seen, a mask drawn; the first label that holds + 1, or 0."""
    if isinstance(label, TimeToEvent):
        return int(label.event)
    if isinstance(label, MaskLabel):
        return int(label.drawn)
    if isinstance(label, tuple):
        return label.index(True) + 1 if True in label else 0
    return label


def num_strata(task: TaskSpec) -> int:
    """How many values `stratum` has."""
    return 2 if isinstance(task, SurvivalSpec | SegmentationSpec) else len(task.outputs) + (not isinstance(task, LabelSpec))


def _parsed(task: TaskSpec, text: str) -> StudyLabel:
    match task:
        case MultiLabelSpec():
            if not set(text) <= set(_READ):
                raise ValueError("other signs than 0, 1 and -")
            return tuple(_READ[sign] for sign in text)
        case SurvivalSpec():
            return TimeToEvent(float(text.removesuffix("+")), not text.endswith("+"))
        case _:
            return MaskLabel(text == _DRAWN)
