"""The report's figures of times: Kaplan and Meier's survival beside the predicted one, and calibration at every edge."""

from collections.abc import Sequence

from markupsafe import Markup

from draf_dist.evaluation.figures import UNIT, Figure
from draf_dist.evaluation.plots import Axes, Band, Line, even_ticks, line_chart, swatch
from draf_dist.evaluation.results import EventBin, EventDiagram, SurvivalCurve, TimesResult

PREDICTED, SEEN = 0, 1


def survival_figure(split: str, times: TimesResult) -> Figure:
    """All studies, then thirds by predicted risk: one chart each."""
    charts = tuple(_survival_chart(f"{split}: {curve.name} (n = {curve.num_studies})", curve, times) for curve in times.curves)
    legend = ((swatch(PREDICTED), "mean predicted survival"), (swatch(SEEN), "Kaplan-Meier, with its 95 % band"))
    return Figure(charts, legend)


def event_figure(split: str, times: TimesResult) -> Figure:
    """Share with an event against its predicted probability, raw and scaled: one chart an edge."""
    charts = []
    for at in times.edges:
        found = {diagram.scaled: diagram for diagram in times.diagrams if diagram.at == at}
        charts.append(_event_chart(f"{split}: event by {at:g} {times.unit}", found[False], found[True]))
    legend = ((swatch(1, with_marker=True), "raw"), (swatch(0, with_marker=True), "temperature-scaled"))
    return Figure(tuple(charts), legend)


def _survival_chart(title: str, curve: SurvivalCurve, times: TimesResult) -> Markup:
    last = times.edges[-1]
    ticks = [(0.0, "0"), *((edge, f"{edge:g}") for edge in times.edges)]
    axes = Axes((0, last), (0, 1), f"time in {times.unit}, marks at the edges", "share without the event", ticks, UNIT)
    lines = [
        Line("Kaplan-Meier", curve.time, curve.observed, style=SEEN),
        Line("predicted", curve.time, curve.predicted, style=PREDICTED),
    ]
    return line_chart(title, lines, axes, band=Band(curve.time, curve.low, curve.high, style=SEEN))


def _event_chart(title: str, raw: EventDiagram, scaled: EventDiagram) -> Markup:
    largest = max((_end(each) for diagram in (raw, scaled) for each in diagram.bins), default=1.0)
    # Where events are rare, all of the diagram would lie in one corner.
    top = min(1.0, 1.1 * largest) or 1.0
    axes = Axes((0, top), (0, top), "predicted probability", "share with the event", even_ticks(0, top), even_ticks(0, top))
    lines = [_line("raw", raw.bins, 1), _line("temperature-scaled", scaled.bins, 0)]
    diagonal = Line("", (0, top), (0, top), style=None)
    return line_chart(title, [diagonal, *lines], axes)


def _line(name: str, bins: Sequence[EventBin], style: int) -> Line:
    return Line(name, [each.predicted for each in bins], [each.observed for each in bins], style=style, markers=True)


def _end(each: EventBin) -> float:
    return max(each.predicted, each.observed or 0.0)
