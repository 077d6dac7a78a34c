"""From the predictions of one clean split to its part of evaluation.json."""

import numpy as np
from numpy.typing import NDArray

from draf_dist.evaluation.answers import LabelAnswers, TimeAnswers
from draf_dist.evaluation.context import Context, all_estimates, short_estimates
from draf_dist.evaluation.describe_classes import ClassParts, describe_classes, describe_regret
from draf_dist.evaluation.describe_labels import describe_labels
from draf_dist.evaluation.describe_times import describe_times
from draf_dist.evaluation.label_scores import LabelScores
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.results import Group, SplitResult
from draf_dist.evaluation.scores import Scored, class_counts
from draf_dist.evaluation.time_scores import TimeScores

# What class_counts counts of times.
CENSORED, EVENT = "censored", "event"


def describe_split(predictions: Predictions, context: Context) -> SplitResult:
    """Everything that is reported of one clean split."""
    known = predictions.labelled()
    resamples = context.resamples_of_group(known)
    raw, scaled = context.scored(known, scaled=False), context.scored(known, scaled=True)
    common = {
        "split": predictions.split,
        "num_studies": known.num_studies,
        "num_unlabelled": predictions.num_studies - known.num_studies,
        "num_subjects": resamples.num_subjects,
        "class_counts": counts_of(known),
        "raw": all_estimates(raw, resamples, context.job),
        "scaled": all_estimates(scaled, resamples, context.job),
        "reliability": mean_reliability(known),
        "by_site": _sites(known, context),
        "by_pattern": _patterns(known, context),
    }
    match raw, scaled:
        case Scored(), Scored():
            parts: ClassParts = describe_classes(raw, scaled, known.classes, context.job)
            return SplitResult(**common, **parts, regret=describe_regret(known, context, resamples))
        case LabelScores(), LabelScores():
            return SplitResult(**common, labels=describe_labels(known, raw, scaled, context))
        case TimeScores(), TimeScores():
            return SplitResult(**common, times=describe_times(known, raw, scaled, context))
    raise TypeError("two sides of one task")


def counted_names(predictions: Predictions) -> tuple[str, ...]:
    """What `counts_of` counts: classes, labels that hold, or what became of a time."""
    return (CENSORED, EVENT) if isinstance(predictions.answers, TimeAnswers) else predictions.classes


def counts_of(known: Predictions) -> tuple[int, ...]:
    """Studies of every class; with every label; censored, and with an event."""
    match known.answers:
        case LabelAnswers(label, _):
            return tuple(int(count) for count in label.sum(axis=0))
        case TimeAnswers(_, event, _, _):
            return class_counts(event.astype(np.int64), 2)
        case None:
            return class_counts(known.target, len(known.classes))


def mean_reliability(predictions: Predictions) -> dict[str, float | None]:
    """Mean weight of every modality over the studies in which it is present."""
    return masked_means(predictions, predictions.reliability)


def masked_means(predictions: Predictions, values: NDArray[np.float32]) -> dict[str, float | None]:
    """Mean of (n, M) values over the studies in which the modality is present; None where it never is."""
    usable = predictions.present & np.isfinite(values)
    return {
        name: float(values[usable[:, m], m].astype(np.float64).mean()) if usable[:, m].any() else None
        for m, name in enumerate(predictions.modalities)
    }


def _sites(known: Predictions, context: Context) -> tuple[Group, ...]:
    return tuple(_group(known.rows(known.site == site), str(site), (), context) for site in np.unique(known.site))


def _patterns(known: Predictions, context: Context) -> tuple[Group, ...]:
    """Groups by which modalities are present, the most frequent first."""
    groups = []
    for pattern in np.unique(known.present, axis=0):
        present = tuple(bool(flag) for flag in pattern)
        name = " + ".join(modality for modality, flag in zip(known.modalities, present, strict=True) if flag)
        groups.append(_group(known.rows((known.present == pattern).all(axis=1)), name, present, context))
    return tuple(sorted(groups, key=lambda group: (-group.num_studies, group.name)))


def _group(part: Predictions, name: str, present: tuple[bool, ...], context: Context) -> Group:
    resamples = context.resamples_of_group(part)
    return Group(
        name=name,
        present=present,
        num_studies=part.num_studies,
        num_subjects=resamples.num_subjects,
        class_counts=counts_of(part),
        metrics=short_estimates(context.scored(part, scaled=True), resamples),
        regret=describe_regret(part, context, resamples),
    )
