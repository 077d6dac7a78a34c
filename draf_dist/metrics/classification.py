"""How often and in which order a classifier is right: accuracy, F1, AUROC, AUPRC, PPV and recall."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


def predicted_class(probability: Floats) -> Integers:
    """The most probable class; with two classes, class 1 from probability .5 on."""
    if probability.shape[1] == 2:
        return np.asarray(probability[:, 1] >= 0.5, dtype=np.int64)
    return np.asarray(np.argmax(probability, axis=1), dtype=np.int64)


def accuracy(probability: Floats, label: Integers) -> float:
    """Share of studies whose most probable class is the label; NaN without studies."""
    return mean_or_nan(predicted_class(probability) == label)


def f1(probability: Floats, label: Integers) -> float:
    """F1 = 2 TP / (2 TP + FP + FN): of class 1 at probability .5 with two classes, else the mean over classes.

    A class that is neither predicted nor present has no F1 and is left out of the mean; NaN if that leaves none.
    """
    prediction = predicted_class(probability)
    return _mean_over_classes([_f1_of(prediction == k, label == k) for k in _scored_classes(probability)])


def auroc(probability: Floats, label: Integers) -> float:
    """Area under the ROC curve: of class 1 with two classes, else the mean over classes, one against the rest.

    The chance that a study of the class is ranked above one of the others, a tie counting one half. Classes with no study,
    or with all of them, are skipped (`num_undefined_classes` tells how many); NaN if that leaves none.
    """
    return _mean_over_classes([_auroc_of(probability[:, k], label == k) for k in _scored_classes(probability)])


def auprc(probability: Floats, label: Integers) -> float:
    """Area under the precision-recall curve as average precision: sum over thresholds of (R_i - R_{i-1}) P_i.

    No interpolation; studies of equal score pass the threshold together. Averaged and skipped as in `auroc`.
    """
    return _mean_over_classes([_average_precision(probability[:, k], label == k) for k in _scored_classes(probability)])


def auroc_of_resamples(probability: Floats, label: Integers, counts: Floats) -> Floats:
    """`auroc` of R resamples at once; counts (R, n) says how often each study occurs in each of them. (R,)."""
    by_class = np.stack([_auroc_of_counts(probability[:, k], label == k, counts) for k in _scored_classes(probability)])
    defined = ~np.isnan(by_class)
    total, number = np.where(defined, by_class, 0.0).sum(axis=0), defined.sum(axis=0)
    return np.asarray(np.where(number > 0, total / np.maximum(number, 1), np.nan), dtype=np.float64)


def num_undefined_classes(label: Integers, num_classes: int) -> int:
    """Classes that AUROC and AUPRC skip, because these studies hold none of them or nothing else."""
    counts = np.bincount(label, minlength=num_classes)
    scored = counts[1:] if num_classes == 2 else counts
    return int(np.sum((scored == 0) | (scored == len(label))))


def positive_predictive_value(score: Floats, positive: Flags, *, threshold: float) -> float:
    """TP / (TP + FP) of the rule score >= threshold; NaN if the rule never fires."""
    return mean_or_nan(positive[score >= threshold])


def recall(score: Floats, positive: Flags, *, threshold: float) -> float:
    """TP / (TP + FN) of the rule score >= threshold; NaN without positives."""
    return mean_or_nan(score[positive] >= threshold)


def mean_or_nan(values: Floats | Flags) -> float:
    """The mean, NaN of nothing (numpy would warn)."""
    return float(values.sum()) / len(values) if len(values) else float("nan")


def _scored_classes(probability: Floats) -> range:
    num_classes = probability.shape[1]
    return range(1, 2) if num_classes == 2 else range(num_classes)


def _mean_over_classes(values: list[float]) -> float:
    return mean_or_nan(np.array([value for value in values if not np.isnan(value)]))


def _f1_of(predicted: Flags, positive: Flags) -> float:
    counted = int(predicted.sum()) + int(positive.sum())
    return 2.0 * float(np.sum(predicted & positive)) / counted if counted else float("nan")


def _auroc_of(score: Floats, positive: Flags) -> float:
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    # Mann-Whitney: pairs won, a tie being half a pair, over the number of pairs. Mean of the counts below and up to a score.
    negatives = np.sort(score[~positive])
    below = np.searchsorted(negatives, score[positive], side="left").sum()
    up_to = np.searchsorted(negatives, score[positive], side="right").sum()
    return float(below + up_to) / (2 * num_positive * num_negative)


def _auroc_of_counts(score: Floats, positive: Flags, counts: Floats) -> Floats:
    if len(score) == 0:
        return np.full(len(counts), np.nan)
    order = np.argsort(score, kind="stable")
    first_of_tie = np.flatnonzero(np.append(True, np.diff(score[order]) != 0))
    drawn = counts[:, order]
    positives = np.add.reduceat(drawn * positive[order], first_of_tie, axis=1)
    negatives = np.add.reduceat(drawn * ~positive[order], first_of_tie, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    won = np.sum(positives * (below + negatives / 2), axis=1)
    return np.asarray(np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan), dtype=np.float64)


def _average_precision(score: Floats, positive: Flags) -> float:
    num_positive = int(positive.sum())
    if num_positive == 0 or num_positive == len(positive):
        return float("nan")
    order = np.argsort(-score, kind="stable")
    last_of_tie = np.append(np.diff(score[order]) != 0, True)
    found = np.cumsum(positive[order])[last_of_tie]
    passed = np.flatnonzero(last_of_tie) + 1
    return float(np.sum(np.diff(found, prepend=0) * found / passed) / num_positive)
