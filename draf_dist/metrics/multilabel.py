"""Several yes-or-no labels of which each is known or not by itself: every metric by label, and its mean over labels.

Throughout probability is float (n, K) of each label by itself, label and observed bool (n, K). What was not observed plays no part,
whatever probability and label hold there. ECE, Brier and NLL ask about the probability of the label, not about the confidence in
the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from draf_dist.metrics import calibration, classification
from draf_dist.metrics.classification import Flags, Floats, Integers, mean_or_nan

# Of one label: probabilities (n, 2) and the label as class 0 or 1 (n,).
_OfOne = Callable[[Floats, Integers], float]


@dataclass(frozen=True)
class ByLabel:
    """A metric of each label, values (K,), NaN where the studies don't define it."""

    values: Floats

    @property
    def mean(self) -> float:
        """The mean over the labels that have one, each counting the same (macro); NaN if none has."""
        return mean_or_nan(self.values[~np.isnan(self.values)])

    @property
    def num_left_out(self) -> int:
        """Labels that are not in the mean."""
        return int(np.isnan(self.values).sum())


def auroc(probability: Floats, label: Flags, observed: Flags) -> ByLabel:
    """Area under the ROC curve of every label, as in classification.py; left out are those without both values observed."""
    return _by_label(classification.auroc, probability, label, observed)


def auprc(probability: Floats, label: Flags, observed: Flags) -> ByLabel:
    """Average precision of every label, as in classification.py; left out are those without both values observed."""
    return _by_label(classification.auprc, probability, label, observed)


def expected_calibration_error(probability: Floats, label: Flags, observed: Flags) -> ByLabel:
    """Of every label the ECE of its probability against its frequency (classwise ECE, spec 5); left out: never observed."""
    return _by_label(_calibration_error, probability, label, observed)


def brier(probability: Floats, label: Flags, observed: Flags) -> ByLabel:
    """Of every label the mean of (p - y)^2, in [0, 1]; left out: never observed."""
    return _by_label(calibration.brier_binary, probability, label, observed)


def negative_log_likelihood(probability: Floats, label: Flags, observed: Flags) -> ByLabel:
    """Of every label the mean in nats of -ln p where it is true and -ln(1 - p) where not; left out: never observed."""
    return _by_label(calibration.negative_log_likelihood, probability, label, observed)


def _by_label(metric: _OfOne, probability: Floats, label: Flags, observed: Flags) -> ByLabel:
    columns = zip(probability.T, label.T, observed.T, strict=True)
    return ByLabel(np.array([metric(_two_classes(p[seen]), y[seen].astype(np.int64)) for p, y, seen in columns], dtype=np.float64))


def _two_classes(probability: Floats) -> Floats:
    return np.stack([1 - probability, probability], axis=1)


def _calibration_error(probability: Floats, label: Integers) -> float:
    bins = calibration.equal_width_bins(*calibration.class_one(probability, label))
    return calibration.expected_calibration_error(bins)
