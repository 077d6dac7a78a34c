"""Whether probabilities mean what they say: reliability bins, ECE, MCE, Brier, NLL, and how low ECE can get at this n.

Two questions are never mixed: "when it is c sure of its class, is it right with frequency c?" (`top_label`) and "of those
given probability c of class 1, do a share c have it?" (`class_one`).
"""

from dataclasses import dataclass

import numpy as np

from draf_dist.metrics.classification import Flags, Floats, Integers, mean_or_nan, predicted_class

NUM_BINS = 15
SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class Bins:
    """Non-empty bins of a reliability diagram: edges (lo, hi], number of studies, mean confidence, share of hits. All (b,)."""

    low: Floats
    high: Floats
    count: Integers
    confidence: Floats
    frequency: Floats

    @property
    def gap(self) -> Floats:
        """|confidence - frequency|, (b,)."""
        return np.abs(self.confidence - self.frequency)


def top_label(probability: Floats, label: Integers) -> tuple[Floats, Flags]:
    """Confidence in the predicted class, and whether it is right. Each (n,)."""
    prediction = predicted_class(probability)
    return np.take_along_axis(probability, prediction[:, None], axis=1)[:, 0], prediction == label


def class_one(probability: Floats, label: Integers) -> tuple[Floats, Flags]:
    """Probability of class 1, and whether it is the label. Each (n,)."""
    return probability[:, 1], label == 1


def equal_width_bins(confidence: Floats, hit: Flags, num_bins: int = NUM_BINS) -> Bins:
    """Bins (lo, hi] of equal width on [0, 1]; a confidence of exactly 0 goes to the first."""
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    place = np.searchsorted(edges[1:-1], confidence, side="left")
    count = np.bincount(place, minlength=num_bins)
    filled = count > 0
    divisor = count[filled]
    return Bins(
        low=edges[:-1][filled],
        high=edges[1:][filled],
        count=divisor.astype(np.int64),
        confidence=np.bincount(place, weights=confidence, minlength=num_bins)[filled] / divisor,
        frequency=np.bincount(place, weights=hit, minlength=num_bins)[filled] / divisor,
    )


def equal_mass_bins(confidence: Floats, hit: Flags, num_bins: int = NUM_BINS) -> Bins:
    """Bins that hold the same number of studies, to one; fewer where there are fewer studies than bins.

    Studies of equal confidence that fall on an edge share their hits equally, so the order of the rows plays no part.
    """
    order = np.argsort(confidence, kind="stable")
    sorted_confidence = confidence[order]
    shared_hit = mean_over_ties(sorted_confidence, hit[order].astype(np.float64))
    filled = min(num_bins, len(confidence))
    if filled == 0:
        return equal_width_bins(confidence, hit, num_bins)
    # The cut of np.array_split: the first n mod b bins hold one study more.
    sizes = np.full(filled, len(confidence) // filled) + (np.arange(filled) < len(confidence) % filled)
    start = np.cumsum(sizes) - sizes
    return Bins(
        low=sorted_confidence[start],
        high=sorted_confidence[start + sizes - 1],
        count=sizes.astype(np.int64),
        confidence=np.add.reduceat(sorted_confidence, start) / sizes,
        frequency=np.add.reduceat(shared_hit, start) / sizes,
    )


def mean_over_ties(sorted_keys: Floats, values: Floats) -> Floats:
    """Values with each run of equal keys replaced by its mean; keys are sorted. (n,)."""
    if len(values) == 0:
        return values
    group = np.concatenate([[0], np.cumsum(np.diff(sorted_keys) != 0)])
    count = np.bincount(group)
    return np.asarray(np.bincount(group, weights=values)[group] / count[group], dtype=np.float64)


def expected_calibration_error(bins: Bins) -> float:
    """ECE = sum over bins of n_b / n * |confidence_b - frequency_b|; NaN without studies."""
    total = int(bins.count.sum())
    return float(np.sum(bins.count * bins.gap) / total) if total else float("nan")


def maximum_calibration_error(bins: Bins) -> float:
    """MCE: the largest gap over non-empty bins; NaN without studies."""
    return float(bins.gap.max()) if len(bins.count) else float("nan")


def brier(probability: Floats, label: Integers) -> float:
    """Mean over studies of sum_k (p_k - [y = k])^2, in [0, 2]."""
    one_hot = np.eye(probability.shape[1])[label]
    return mean_or_nan(np.sum((probability - one_hot) ** 2, axis=1))


def brier_binary(probability: Floats, label: Integers) -> float:
    """Mean of (p_1 - y)^2, in [0, 1]: half of `brier` with two classes, and the number usually printed."""
    return mean_or_nan((probability[:, 1] - (label == 1)) ** 2)


def negative_log_likelihood(probability: Floats, label: Integers) -> float:
    """Mean of -ln p_y in nats, p clipped at 1e-12."""
    return mean_or_nan(pointwise_negative_log_likelihood(probability, label))


def pointwise_negative_log_likelihood(probability: Floats, label: Integers) -> Floats:
    """-ln p_y of every study in nats, p clipped at 1e-12. (n,)."""
    chosen = np.take_along_axis(probability, label[:, None], axis=1)[:, 0]
    return np.asarray(-np.log(np.maximum(chosen, SMALLEST_PROBABILITY)), dtype=np.float64)


def ece_floor(confidence: Floats, *, replicates: int, seed: int, num_bins: int = NUM_BINS) -> tuple[float, float]:
    """What ECE a perfectly calibrated model with these confidences would show: its mean and its 95th percentile.

    Outcomes are drawn from the confidences themselves, hit ~ Bernoulli(confidence), so what is left of ECE is sampling noise.
    An ECE at or below this floor is no evidence of miscalibration, and differences below it mean nothing.
    """
    if len(confidence) == 0:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    simulated = [
        expected_calibration_error(equal_width_bins(confidence, generator.random(len(confidence)) < confidence, num_bins))
        for _ in range(replicates)
    ]
    return float(np.mean(simulated)), float(np.quantile(simulated, 0.95))
