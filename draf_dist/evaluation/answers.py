"""What is known of the studies behind predictions where that is no class: answers to several labels, or times of an event."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from draf_dist.metrics import survival
from draf_dist.metrics.classification import Floats
from draf_dist.schema.batch import Batch, ClassTarget, MultiLabelTarget, SurvivalTarget
from draf_dist.schema.label import SurvivalSpec, TaskSpec


@dataclass(frozen=True)
class LabelAnswers:
    """label, observed: bool (n, K); where a label was not observed it is False."""

    label: NDArray[np.bool_]
    observed: NDArray[np.bool_]


@dataclass(frozen=True)
class TimeAnswers:
    """time: f32 (n,), of the event or of the last time seen. event: bool (n,). edges: of the intervals, as in SurvivalSpec."""

    time: NDArray[np.float32]
    event: NDArray[np.bool_]
    edges: tuple[float, ...]
    unit: str


Answers = LabelAnswers | TimeAnswers


def targets_of(batch: Batch) -> NDArray[np.int64]:
    """Class index; how many labels are known to hold; interval of the time. -1 where nothing is known. (B,).

    Raises:
        TypeError: the target is a mask.
    """
    match batch.target:
        case ClassTarget(label, known):
            target = label
        case MultiLabelTarget(labels, observed):
            target, known = (labels & observed).sum(1), observed.any(1)
        case SurvivalTarget(_, _, interval, known):
            target = interval
        case _:
            raise TypeError(f"{type(batch.target).__name__} has no predictions of studies")
    return np.where(known.cpu().numpy(), target.cpu().numpy(), -1).astype(np.int64)


def answers_of(batch: Batch, task: TaskSpec) -> Answers | None:
    """The rest of what is known; None of classes, which are their index."""
    match batch.target, task:
        case MultiLabelTarget(label, observed), _:
            return LabelAnswers((label & observed).cpu().numpy(), observed.cpu().numpy())
        case SurvivalTarget(time, event, _, _), SurvivalSpec():
            return TimeAnswers(time.float().cpu().numpy(), event.cpu().numpy(), task.edges, task.unit)
        case _:
            return None


def risk_of(probability: Floats, answers: Answers | None) -> Floats:
    """One number a study that rises with its risk, of probabilities (n, K): (n,).

    Of two classes the probability of class 1, of more not a number; of labels their mean probability; of hazards -sum_k S_k.
    """
    match answers:
        case LabelAnswers():
            return np.asarray(probability.mean(axis=1), dtype=np.float64)
        case TimeAnswers():
            return survival.risk(probability)
        case None:
            return probability[:, 1] if probability.shape[1] == 2 else np.full(len(probability), np.nan)
