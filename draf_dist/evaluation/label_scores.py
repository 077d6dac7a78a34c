"""The metrics of several labels: each over the studies in which it was observed, and the mean over labels (macro)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from draf_dist.evaluation.scores import Scored
from draf_dist.evaluation.task_scores import MetricInfo
from draf_dist.metrics import calibration, classification, multilabel, selective
from draf_dist.metrics.classification import Flags, Floats, Integers

METRICS = {
    "auroc": MetricInfo(
        "AUROC", "higher", "mean over labels of the chance that a study with the label outranks one without; .5 is guessing"
    ),
    "auprc": MetricInfo("AUPRC", "higher", "mean over labels of the average precision; guessing gives the prevalence"),
    "f1": MetricInfo("F1", "higher", "mean over labels, at probability .5"),
    "ppv": MetricInfo("PPV", "higher", "mean over labels: of the alarms at the fixed threshold, the share that is right"),
    "recall": MetricInfo(
        "Recall", "higher", "mean over labels: of the positives, the share that raises an alarm at the fixed threshold"
    ),
    "nll": MetricInfo(
        "NLL (nats)", "lower", "mean over studies of the mean over their known labels, as the loss of training has it"
    ),
    "nll_macro": MetricInfo("NLL, by label", "lower", "mean over labels of the mean over the studies in which the label is known"),
    "brier": MetricInfo("Brier", "lower", "mean over labels of the squared distance of the probability from the answer, 0 to 1"),
    "ece": MetricInfo(
        "ECE", "lower", "mean over labels of the gap between a label's probability and its frequency, 15 bins of equal width"
    ),
    "aurc": MetricInfo("AURC", "lower", "mean over labels of the error rate over all degrees of abstention, least confident first"),
    "e_aurc": MetricInfo("E-AURC", "lower", "AURC above that of the best possible order of the same errors, mean over labels"),
    "aurc_epistemic": MetricInfo("AURC by epistemic", "lower", "AURC when abstaining from studies of high epistemic variance"),
    "coverage_at_risk": MetricInfo(
        "Coverage at risk", "higher", "mean over labels of the largest share kept within the target error rate"
    ),
}
COLUMNS = ("auroc", "auprc", "nll", "ece")
LABEL_COLUMNS = ("auroc", "auprc", "nll", "brier", "ece")
PRIMARY = "auroc"
# Of one label: probabilities (m, 2), the label as class 0 or 1 (m,), epistemic variance (m,).
_OfOne = Callable[[Floats, Integers, Floats], float]


@dataclass(frozen=True)
class LabelScores:
    """probability (n, K) of each label by itself; label, observed: bool (n, K), one known in every row; epistemic (n,)."""

    probability: Floats
    label: Flags
    observed: Flags
    epistemic: Floats

    def rows(self, index: Integers) -> "LabelScores":
        """Some of the studies, with repeats if asked for."""
        return LabelScores(self.probability[index], self.label[index], self.observed[index], self.epistemic[index])

    def only(self, k: int) -> "LabelScores":
        """One label, of the studies in which it was observed."""
        seen, one = self.observed[:, k], slice(k, k + 1)
        return LabelScores(self.probability[seen, one], self.label[seen, one], self.observed[seen, one], self.epistemic[seen])

    def as_classes(self, k: int) -> Scored:
        """One label as a class of two, of the studies in which it was observed."""
        seen = self.observed[:, k]
        return Scored(_both(self.probability[seen, k]), self.label[seen, k].astype(np.int64), self.epistemic[seen])

    def short(self) -> dict[str, float]:
        """AUROC, AUPRC, NLL, Brier and ECE."""
        each = (self.probability, self.label, self.observed)
        return {
            "auroc": multilabel.auroc(*each).mean,
            "auprc": multilabel.auprc(*each).mean,
            "nll": classification.mean_or_nan(self.pointwise_nll()),
            "brier": multilabel.brier(*each).mean,
            "ece": multilabel.expected_calibration_error(*each).mean,
        }

    def all(self, *, threshold: float, risk: float) -> dict[str, float]:
        """Every metric."""
        computed = {
            **self.short(),
            "nll_macro": multilabel.negative_log_likelihood(self.probability, self.label, self.observed).mean,
            "f1": self._macro(lambda p, y, _: classification.f1(p, y)),
            "ppv": self._macro(lambda p, y, _: classification.positive_predictive_value(p[:, 1], y == 1, threshold=threshold)),
            "recall": self._macro(lambda p, y, _: classification.recall(p[:, 1], y == 1, threshold=threshold)),
            "aurc": self._macro(lambda p, y, _: selective.aurc(*_sure(p, y))),
            "e_aurc": self._macro(lambda p, y, _: selective.excess_aurc(*_sure(p, y))),
            "aurc_epistemic": self._macro(lambda p, y, u: selective.aurc(-u, _sure(p, y)[1])),
            "coverage_at_risk": self._macro(lambda p, y, _: selective.coverage_at_risk(*_sure(p, y), risk=risk)),
        }
        return {name: computed[name] for name in METRICS}

    def pointwise_nll(self) -> Floats:
        """The mean over a study's known labels of -ln p where it holds and -ln(1 - p) where not, in nats. (n,)."""
        right = np.where(self.label, self.probability, 1 - self.probability)
        nll = np.where(self.observed, -np.log(np.maximum(right, calibration.SMALLEST_PROBABILITY)), 0.0)
        return np.asarray(nll.sum(axis=1) / self.observed.sum(axis=1), dtype=np.float64)

    def primary_of_resamples(self, counts: Floats) -> Floats:
        """The mean AUROC of R resamples, over the labels that have one there. (R,)."""
        columns = zip(self.probability.T, self.label.T, self.observed.T, strict=True)
        by_label = np.stack(
            [classification.auroc_of_resamples(_both(p[seen]), y[seen].astype(np.int64), counts[:, seen]) for p, y, seen in columns]
        )
        defined = ~np.isnan(by_label)
        total, number = np.where(defined, by_label, 0.0).sum(axis=0), defined.sum(axis=0)
        return np.asarray(np.where(number > 0, total / np.maximum(number, 1), np.nan), dtype=np.float64)

    def right(self) -> Flags:
        """Whether all known labels of a study are on the right side of .5, (n,)."""
        return np.asarray((((self.probability >= 0.5) == self.label) | ~self.observed).all(axis=1), dtype=np.bool_)

    def _macro(self, metric: _OfOne) -> float:
        each = map(self.as_classes, range(self.probability.shape[1]))
        values = [metric(one.probability, one.label, one.epistemic) for one in each]
        return classification.mean_or_nan(np.array([value for value in values if not np.isnan(value)]))


def _both(probability: Floats) -> Floats:
    return np.stack([1 - probability, probability], axis=1)


def _sure(probability: Floats, label: Integers) -> tuple[Floats, Flags]:
    """Confidence in the answer, and whether it is wrong."""
    confidence, hit = calibration.top_label(probability, label)
    return confidence, ~hit
