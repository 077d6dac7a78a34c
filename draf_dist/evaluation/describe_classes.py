"""What is reported of classes alone: reliability diagrams, abstention by class, alarms, and regret against a planted truth."""

from typing import TypedDict

import numpy as np

from draf_dist.evaluation.context import ONE_CLASS, Context
from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.regret import pointwise_divergence, pointwise_regret, posterior
from draf_dist.evaluation.results import AlarmCurveData, ClassCurveData, Curve, Diagram, DiagramBin, Floor, RegretData
from draf_dist.evaluation.scores import Scored, short_scores
from draf_dist.evaluation.statistics import Estimate, Floats, Resamples, estimate_all
from draf_dist.metrics import calibration, selective
from draf_dist.metrics.classification import num_undefined_classes

CURVE_POINTS = 101
FLOOR_REPLICATES = 200


class ClassParts(TypedDict):
    """The parts of a SplitResult that classes have."""

    num_undefined_classes: int
    ece_floor: Floor
    ece_class_one_floor: Floor | None
    diagrams: tuple[Diagram, ...]
    risk_coverage: tuple[ClassCurveData, ...]
    alarms: AlarmCurveData | None


def describe_classes(raw: Scored, scaled: Scored, classes: tuple[str, ...], job: EvaluateJob) -> ClassParts:
    """Of the same studies before and after temperature scaling."""
    num_classes, label = len(classes), scaled.label
    two_classes = num_classes == 2
    return ClassParts(
        num_undefined_classes=num_undefined_classes(label, num_classes),
        ece_floor=floor_of(calibration.top_label(scaled.probability, label)[0], job.seed),
        ece_class_one_floor=floor_of(scaled.probability[:, 1], job.seed) if two_classes else None,
        diagrams=_diagrams(raw, scaled=False) + _diagrams(scaled, scaled=True),
        risk_coverage=tuple(class_curve_of(scaled, k, name) for k, name in enumerate(classes)),
        alarms=_alarms(scaled, job.threshold) if two_classes else None,
    )


def describe_regret(predictions: Predictions, context: Context, resamples: Resamples) -> RegretData | None:
    """Nats lost to the exact posterior of what is present in these predictions; None without a planted truth."""
    if context.truth is None:
        return None
    exact = posterior(predictions, context.truth)
    label = predictions.target
    scaled, raw = (_probability(predictions, context, scaled=flag) for flag in (True, False))
    pointwise = {
        "observed": pointwise_regret(exact, scaled, label),
        "expected": pointwise_divergence(exact, scaled),
        "expected_raw": pointwise_divergence(exact, raw),
    }
    estimates = estimate_all(lambda rows: {name: float(values[rows].mean()) for name, values in pointwise.items()}, resamples)
    reference = short_scores(Scored(exact, label, np.zeros(len(label))))
    return RegretData(**estimates, posterior={name: Estimate.of(value, reason=ONE_CLASS) for name, value in reference.items()})


def floor_of(confidence: Floats, seed: int) -> Floor:
    """The ECE of a perfectly calibrated model with these confidences (n,)."""
    mean, high = calibration.ece_floor(confidence, replicates=FLOOR_REPLICATES, seed=seed)
    return Floor(mean=Estimate.of(mean).value, high=Estimate.of(high).value)


def bins_of(bins: calibration.Bins) -> tuple[DiagramBin, ...]:
    """As they are stored."""
    columns = (bins.low.tolist(), bins.high.tolist(), bins.count.tolist(), bins.confidence.tolist(), bins.frequency.tolist())
    return tuple(
        DiagramBin(low=low, high=high, count=count, confidence=confidence, frequency=frequency)
        for low, high, count, confidence, frequency in zip(*columns, strict=True)
    )


def class_curve_of(scored: Scored, class_index: int, name: str) -> ClassCurveData:
    """What abstaining does to one class."""
    curve = selective.class_curve(scored.probability, scored.label, class_index)
    return ClassCurveData(name=name, coverage=_thin(curve.coverage), kept=_thin(curve.kept), risk=_thin(curve.risk))


def _probability(predictions: Predictions, context: Context, *, scaled: bool) -> Floats:
    found = context.scored(predictions, scaled=scaled)
    assert isinstance(found, Scored), "posterior() refuses a truth of anything but two classes"
    return found.probability


def _diagrams(scored: Scored, *, scaled: bool) -> tuple[Diagram, ...]:
    top = calibration.equal_width_bins(*calibration.top_label(scored.probability, scored.label))
    diagrams = [Diagram(question="top_label", scaled=scaled, bins=bins_of(top))]
    if scored.probability.shape[1] == 2:
        one = calibration.equal_width_bins(*calibration.class_one(scored.probability, scored.label))
        diagrams.append(Diagram(question="class_one", scaled=scaled, bins=bins_of(one)))
    return tuple(diagrams)


def _alarms(scored: Scored, threshold: float) -> AlarmCurveData:
    curve = selective.alarm_curve(scored.probability, scored.label, threshold=threshold)
    return AlarmCurveData(threshold=threshold, coverage=_thin(curve.coverage), ppv=_thin(curve.ppv), recall=_thin(curve.recall))


def _thin(values: Floats) -> Curve:
    """At most CURVE_POINTS of the values, the last among them."""
    if len(values) == 0:
        return ()
    kept = np.unique(np.linspace(0, len(values) - 1, min(CURVE_POINTS, len(values))).round().astype(np.int64))
    return tuple(None if np.isnan(value) else float(value) for value in values[kept])
