"""What is reported of each of several labels: its metrics, its reliability diagram, what abstaining does to it."""

from draf_dist.evaluation.context import Context, short_estimates
from draf_dist.evaluation.describe_classes import bins_of, class_curve_of, floor_of
from draf_dist.evaluation.label_scores import LabelScores
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.results import Diagram, LabelResult
from draf_dist.metrics import calibration


def describe_labels(known: Predictions, raw: LabelScores, scaled: LabelScores, context: Context) -> tuple[LabelResult, ...]:
    """One part a label, in order; each of the studies in which it was observed."""
    return tuple(_label(k, name, known, raw, scaled, context) for k, name in enumerate(known.classes))


def _label(k: int, name: str, known: Predictions, raw: LabelScores, scaled: LabelScores, context: Context) -> LabelResult:
    seen, before, after = known.rows(raw.observed[:, k]), raw.only(k), scaled.only(k)
    return LabelResult(
        name=name,
        num_observed=seen.num_studies,
        num_positive=int(after.label.sum()),
        metrics=short_estimates(after, context.resamples_of_group(seen)),
        ece_floor=floor_of(after.probability[:, 0], context.job.seed),
        diagrams=(_diagram(before, scaled=False), _diagram(after, scaled=True)),
        risk_coverage=class_curve_of(scaled.as_classes(k), 1, name),
    )


def _diagram(one: LabelScores, *, scaled: bool) -> Diagram:
    bins = calibration.equal_width_bins(one.probability[:, 0], one.label[:, 0])
    return Diagram(question="class_one", scaled=scaled, bins=bins_of(bins))
