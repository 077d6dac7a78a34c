"""From the predictions of one clean split to its part of evaluation.json."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.regret import PlantedTruth, pointwise_divergence, pointwise_regret, posterior
from draf_dist.evaluation.results import (
    AlarmCurveData,
    ClassCurveData,
    Curve,
    Diagram,
    DiagramBin,
    Floor,
    Group,
    Metrics,
    RegretData,
    SplitResult,
)
from draf_dist.evaluation.scores import Scored, all_scores, class_counts, short_scores
from draf_dist.evaluation.statistics import Estimate, Floats, Resamples, estimate_all
from draf_dist.metrics import calibration, selective
from draf_dist.metrics.classification import num_undefined_classes
from draf_dist.metrics.temperature import scale

CURVE_POINTS = 101
FLOOR_REPLICATES = 200
# Below this an interval says more about the resamples than about the group.
SMALLEST_GROUP = 10
ONE_CLASS = "needs studies of both kinds"


@dataclass(frozen=True)
class Context:
    """What every description needs. subject: uid -> number of the subject; truth: None where none is planted."""

    job: EvaluateJob
    temperature: float
    subject: Mapping[int, int]
    truth: Mapping[int, PlantedTruth] | None

    def resamples(self, predictions: Predictions, replicates: int | None = None) -> Resamples:
        """Resamples of the subjects of these studies."""
        subject = np.array([self.subject[int(uid)] for uid in predictions.uid], dtype=np.int64)
        return Resamples(subject, replicates=self.job.bootstrap if replicates is None else replicates, seed=self.job.seed)

    def scored(self, predictions: Predictions, *, scaled: bool) -> Scored:
        """The labelled predictions as metrics take them, temperature-scaled or not."""
        probability = predictions.probability.astype(np.float64)
        probability = scale(probability, self.temperature if scaled else 1.0)
        return Scored(probability, predictions.target, predictions.epistemic.astype(np.float64))


def describe_split(predictions: Predictions, context: Context) -> SplitResult:
    """Everything that is reported of one clean split."""
    known = predictions.labelled()
    resamples = context.resamples(known, _replicates(known))
    raw, scaled = context.scored(known, scaled=False), context.scored(known, scaled=True)
    num_classes, label = len(predictions.classes), known.target
    two_classes = num_classes == 2
    return SplitResult(
        split=predictions.split,
        num_studies=known.num_studies,
        num_unlabelled=predictions.num_studies - known.num_studies,
        num_subjects=resamples.num_subjects,
        class_counts=class_counts(label, num_classes),
        num_undefined_classes=num_undefined_classes(label, num_classes),
        raw=_all(raw, resamples, context.job),
        scaled=_all(scaled, resamples, context.job),
        ece_floor=_floor(calibration.top_label(scaled.probability, label)[0], context.job.seed),
        ece_class_one_floor=_floor(scaled.probability[:, 1], context.job.seed) if two_classes else None,
        diagrams=_diagrams(raw, scaled=False) + _diagrams(scaled, scaled=True),
        risk_coverage=tuple(_class_curve(scaled, k, name) for k, name in enumerate(predictions.classes)),
        alarms=_alarms(scaled, context.job.threshold) if two_classes else None,
        reliability=mean_reliability(known),
        by_site=_sites(known, context),
        by_pattern=_patterns(known, context),
        regret=describe_regret(known, context, resamples),
    )


def describe_regret(predictions: Predictions, context: Context, resamples: Resamples) -> RegretData | None:
    """Nats lost to the exact posterior of what is present in these predictions; None without a planted truth."""
    if context.truth is None:
        return None
    exact = posterior(predictions, context.truth)
    label = predictions.target
    scaled, raw = (context.scored(predictions, scaled=flag).probability for flag in (True, False))
    pointwise = {
        "observed": pointwise_regret(exact, scaled, label),
        "expected": pointwise_divergence(exact, scaled),
        "expected_raw": pointwise_divergence(exact, raw),
    }
    estimates = estimate_all(lambda rows: {name: float(values[rows].mean()) for name, values in pointwise.items()}, resamples)
    reference = short_scores(Scored(exact, label, np.zeros(len(label))))
    return RegretData(**estimates, posterior={name: Estimate.of(value, reason=ONE_CLASS) for name, value in reference.items()})


def short_estimates(scored: Scored, resamples: Resamples) -> Metrics:
    """The metrics of tables, with intervals."""
    return estimate_all(lambda rows: short_scores(scored.rows(rows)), resamples, reason=ONE_CLASS)


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


def _all(scored: Scored, resamples: Resamples, job: EvaluateJob) -> Metrics:
    def scores(rows: NDArray[np.int64]) -> dict[str, float]:
        return all_scores(scored.rows(rows), threshold=job.threshold, risk=job.target_risk)

    return estimate_all(scores, resamples, reason=ONE_CLASS)


def _floor(confidence: Floats, seed: int) -> Floor:
    mean, high = calibration.ece_floor(confidence, replicates=FLOOR_REPLICATES, seed=seed)
    return Floor(mean=Estimate.of(mean).value, high=Estimate.of(high).value)


def _diagrams(scored: Scored, *, scaled: bool) -> tuple[Diagram, ...]:
    top = calibration.equal_width_bins(*calibration.top_label(scored.probability, scored.label))
    diagrams = [Diagram(question="top_label", scaled=scaled, bins=_bins(top))]
    if scored.probability.shape[1] == 2:
        one = calibration.equal_width_bins(*calibration.class_one(scored.probability, scored.label))
        diagrams.append(Diagram(question="class_one", scaled=scaled, bins=_bins(one)))
    return tuple(diagrams)


def _bins(bins: calibration.Bins) -> tuple[DiagramBin, ...]:
    columns = (bins.low.tolist(), bins.high.tolist(), bins.count.tolist(), bins.confidence.tolist(), bins.frequency.tolist())
    return tuple(
        DiagramBin(low=low, high=high, count=count, confidence=confidence, frequency=frequency)
        for low, high, count, confidence, frequency in zip(*columns, strict=True)
    )


def _class_curve(scored: Scored, class_index: int, name: str) -> ClassCurveData:
    curve = selective.class_curve(scored.probability, scored.label, class_index)
    return ClassCurveData(name=name, coverage=_thin(curve.coverage), kept=_thin(curve.kept), risk=_thin(curve.risk))


def _alarms(scored: Scored, threshold: float) -> AlarmCurveData:
    curve = selective.alarm_curve(scored.probability, scored.label, threshold=threshold)
    return AlarmCurveData(threshold=threshold, coverage=_thin(curve.coverage), ppv=_thin(curve.ppv), recall=_thin(curve.recall))


def _thin(values: Floats) -> Curve:
    """At most CURVE_POINTS of the values, the last among them."""
    if len(values) == 0:
        return ()
    kept = np.unique(np.linspace(0, len(values) - 1, min(CURVE_POINTS, len(values))).round().astype(np.int64))
    return tuple(None if np.isnan(value) else float(value) for value in values[kept])


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


def _replicates(part: Predictions) -> int | None:
    """None is what the job says; too small a group has none."""
    return None if part.num_studies >= SMALLEST_GROUP else 0


def _group(part: Predictions, name: str, present: tuple[bool, ...], context: Context) -> Group:
    resamples = context.resamples(part, _replicates(part))
    return Group(
        name=name,
        present=present,
        num_studies=part.num_studies,
        num_subjects=resamples.num_subjects,
        class_counts=class_counts(part.target, len(part.classes)),
        metrics=short_estimates(context.scored(part, scaled=True), resamples),
        regret=describe_regret(part, context, resamples),
    )
