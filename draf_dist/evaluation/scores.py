"""Which numbers are reported of predictions of a class, under which names, and how to read each."""

from dataclasses import dataclass

import numpy as np

from draf_dist.evaluation.task_scores import MetricInfo
from draf_dist.metrics import calibration, classification, selective
from draf_dist.metrics.classification import Flags, Floats, Integers

METRICS = {
    "auroc": MetricInfo(
        "AUROC", "higher", "chance that a study of the class gets a higher probability than one of the others; .5 is guessing"
    ),
    "auprc": MetricInfo("AUPRC", "higher", "average precision; guessing gives the prevalence"),
    "accuracy": MetricInfo("Accuracy", "higher", "share of studies whose most probable class is the label"),
    "f1": MetricInfo("F1", "higher", "of class 1 at probability .5 with two classes, else the mean over classes"),
    "ppv": MetricInfo("PPV", "higher", "of the alarms at the fixed threshold, the share that is right"),
    "recall": MetricInfo("Recall", "higher", "of the positives, the share that raises an alarm at the fixed threshold"),
    "nll": MetricInfo("NLL (nats)", "lower", "mean -ln of the probability given to the label; punishes being sure and wrong"),
    "brier": MetricInfo("Brier", "lower", "squared distance from the label, summed over classes, 0 to 2"),
    "brier_binary": MetricInfo("Brier, class 1", "lower", "squared distance of the probability of class 1 from the label, 0 to 1"),
    "ece": MetricInfo("ECE", "lower", "mean gap between confidence and accuracy of the predicted class, 15 bins of equal width"),
    "ece_equal_mass": MetricInfo("ECE, equal mass", "lower", "the same with 15 bins that hold equally many studies"),
    "ece_class_one": MetricInfo("ECE, class 1", "lower", "mean gap between the probability of class 1 and its frequency"),
    "mce": MetricInfo("MCE", "lower", "the largest gap of any bin; a bin with one study can set it"),
    "aurc": MetricInfo("AURC", "lower", "mean error rate over all degrees of abstention, least confident first"),
    "e_aurc": MetricInfo("E-AURC", "lower", "AURC above that of the best possible order of the same errors"),
    "aurc_epistemic": MetricInfo(
        "AURC by epistemic", "lower", "AURC when abstaining by epistemic variance instead of top probability"
    ),
    "coverage_at_risk": MetricInfo(
        "Coverage at risk", "higher", "largest share of studies kept with an error rate within the target"
    ),
}
SHORT = ("auroc", "auprc", "accuracy", "nll", "brier", "ece")
COLUMNS = ("auroc", "accuracy", "nll", "ece")
PRIMARY = "auroc"


@dataclass(frozen=True)
class Scored:
    """What metrics need of n labelled studies: probability (n, K), label (n,), epistemic variance (n,)."""

    probability: Floats
    label: Integers
    epistemic: Floats

    def rows(self, index: Integers) -> "Scored":
        """Some of the studies, with repeats if asked for."""
        return Scored(self.probability[index], self.label[index], self.epistemic[index])

    def short(self) -> dict[str, float]:
        """The metrics of tables with many rows."""
        return short_scores(self)

    def all(self, *, threshold: float, risk: float) -> dict[str, float]:
        """Every metric."""
        return all_scores(self, threshold=threshold, risk=risk)

    def pointwise_nll(self) -> Floats:
        """-ln p_y of every study, in nats, (n,)."""
        return calibration.pointwise_negative_log_likelihood(self.probability, self.label)

    def primary_of_resamples(self, counts: Floats) -> Floats:
        """AUROC of R resamples, (R,)."""
        return classification.auroc_of_resamples(self.probability, self.label, counts)

    def right(self) -> Flags:
        """Whether the most probable class is the label, (n,)."""
        return np.asarray(classification.predicted_class(self.probability) == self.label, dtype=np.bool_)


def short_scores(scored: Scored) -> dict[str, float]:
    """The metrics of tables with many rows, by the names of `SHORT`."""
    p, y = scored.probability, scored.label
    return {
        "auroc": classification.auroc(p, y),
        "auprc": classification.auprc(p, y),
        "accuracy": classification.accuracy(p, y),
        "nll": calibration.negative_log_likelihood(p, y),
        "brier": calibration.brier(p, y),
        "ece": calibration.expected_calibration_error(calibration.equal_width_bins(*calibration.top_label(p, y))),
    }


def all_scores(scored: Scored, *, threshold: float, risk: float) -> dict[str, float]:
    """Every metric that exists for this number of classes; threshold is that of PPV and recall, risk that of the coverage."""
    confidence, hit = calibration.top_label(scored.probability, scored.label)
    bins = calibration.equal_width_bins(confidence, hit)
    computed = {
        **short_scores(scored),
        "f1": classification.f1(scored.probability, scored.label),
        "ece_equal_mass": calibration.expected_calibration_error(calibration.equal_mass_bins(confidence, hit)),
        "mce": calibration.maximum_calibration_error(bins),
        "aurc": selective.aurc(confidence, ~hit),
        "e_aurc": selective.excess_aurc(confidence, ~hit),
        "aurc_epistemic": selective.aurc(-scored.epistemic, ~hit),
        "coverage_at_risk": selective.coverage_at_risk(confidence, ~hit, risk=risk),
    }
    if scored.probability.shape[1] == 2:
        computed |= _two_class_scores(scored, threshold)
    return {name: computed[name] for name in METRICS if name in computed}


def _two_class_scores(scored: Scored, threshold: float) -> dict[str, float]:
    score, positive = calibration.class_one(scored.probability, scored.label)
    return {
        "ppv": classification.positive_predictive_value(score, positive, threshold=threshold),
        "recall": classification.recall(score, positive, threshold=threshold),
        "brier_binary": calibration.brier_binary(scored.probability, scored.label),
        "ece_class_one": calibration.expected_calibration_error(calibration.equal_width_bins(score, positive)),
    }


def class_counts(label: Integers, num_classes: int) -> tuple[int, ...]:
    """Studies of every class."""
    return tuple(int(count) for count in np.bincount(label, minlength=num_classes))
