"""What is reported of times to an event: Kaplan and Meier's survival beside the predicted one, and calibration at the edges."""

import numpy as np
from numpy.typing import NDArray

from draf_dist.evaluation.answers import TimeAnswers
from draf_dist.evaluation.context import Context
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.results import Curve, EventBin, EventDiagram, SurvivalCurve, TimesResult
from draf_dist.evaluation.statistics import Estimate, Floats
from draf_dist.evaluation.time_scores import TimeScores
from draf_dist.metrics.kaplan_meier import KaplanMeier, event_bins
from draf_dist.metrics.survival import survival_at

CURVE_POINTS, NUM_BINS = 101, 10
# Thirds of the studies by their risk: whom the model calls safe should live longer.
GROUPS = ("lowest third of risk", "middle third", "highest third")


def describe_times(known: Predictions, raw: TimeScores, scaled: TimeScores, context: Context) -> TimesResult:
    """Of the same studies before and after temperature scaling."""
    answers = known.answers
    assert isinstance(answers, TimeAnswers)
    assert context.follow_up is not None
    edges = np.array(answers.edges)
    return TimesResult(
        unit=answers.unit,
        edges=answers.edges,
        horizon=context.follow_up.horizon,
        curves=_curves(scaled, edges),
        diagrams=tuple(
            _diagram(one, edges, float(at), scaled=flag) for at in edges for one, flag in ((raw, False), (scaled, True))
        ),
    )


def _curves(scored: TimeScores, edges: Floats) -> tuple[SurvivalCurve, ...]:
    """Of all studies, then of thirds by risk."""
    times = np.linspace(0, edges[-1], CURVE_POINTS)
    thirds = np.array_split(np.argsort(scored.risk, kind="stable"), len(GROUPS))
    everyone = np.arange(len(scored.time))
    named = [("all studies", everyone), *zip(GROUPS, thirds, strict=True)]
    return tuple(_curve(name, scored.rows(rows), edges, times) for name, rows in named if len(rows))


def _curve(name: str, scored: TimeScores, edges: Floats, times: Floats) -> SurvivalCurve:
    seen = KaplanMeier.of(scored.time, scored.event)
    low, high = seen.interval(times)
    return SurvivalCurve(
        name=name,
        num_studies=len(scored.time),
        time=_stored(times),
        observed=_stored(seen.at(times)),
        low=_stored(low),
        high=_stored(high),
        predicted=_stored(survival_at(scored.hazard, edges, times).mean(axis=0)),
    )


def _diagram(scored: TimeScores, edges: Floats, at: float, *, scaled: bool) -> EventDiagram:
    predicted = 1 - survival_at(scored.hazard, edges, np.array([at]))[:, 0]
    bins = event_bins(scored.time, scored.event, predicted, at=at, num_bins=NUM_BINS)
    columns = (bins.low, bins.high, bins.count, bins.predicted, bins.observed)
    return EventDiagram(
        at=at,
        scaled=scaled,
        calibration_error=Estimate.of(bins.calibration_error).value,
        bins=tuple(
            EventBin(low=low, high=high, count=count, predicted=mean, observed=None if np.isnan(seen) else seen)
            for low, high, count, mean, seen in zip(*(column.tolist() for column in columns), strict=True)
        ),
    )


def _stored(values: NDArray[np.float64]) -> Curve:
    return tuple(None if np.isnan(value) else float(value) for value in values)
