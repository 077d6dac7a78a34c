"""The report's figures: which numbers of an evaluation go into which chart."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from draf_dist.evaluation.plots import Axes, Line, even_ticks, line_chart, reliability_diagram, swatch
from draf_dist.evaluation.results import Cell, Diagram, Evaluation, SplitResult, Sweep
from draf_dist.evaluation.scoring import TaskMetrics

MISSING = ("missing", "missing_not_at_random")
UNIT = [(value / 4, f"{value / 4:g}") for value in range(5)]
QUESTIONS = {"top_label": "confidence in the predicted class", "class_one": "probability of class 1"}
TITLES = {"top_label": "how sure of its prediction", "class_one": "probability of class 1"}
Value = Callable[[Cell], tuple[float | None, float | None, float | None]]


@dataclass(frozen=True)
class Figure:
    """Charts that share one legend: (swatch, text)."""

    charts: tuple[Markup, ...]
    legend: tuple[tuple[Markup, str], ...] = ()


def calibration_figure(split: SplitResult) -> Figure:
    """Reliability diagrams of both questions, or of every label, raw and scaled."""
    charts = []
    for part in split.labels:
        raw, scaled = part.diagrams
        charts.append(_diagram(f"{split.split}: {part.name}", raw, scaled, f"probability of {part.name}"))
    for question, label in QUESTIONS.items():
        found = {d.scaled: d for d in split.diagrams if d.question == question}
        if found:
            charts.append(_diagram(f"{split.split}: {TITLES[question]}", found[False], found[True], label))
    legend = ((swatch(1, with_marker=True), "raw"), (swatch(0, with_marker=True), "temperature-scaled (bars: its counts)"))
    return Figure(tuple(charts), legend)


def selective_figure(split: SplitResult) -> Figure:
    """Class-wise risk and share kept against coverage; PPV and recall against coverage."""
    by_class = split.risk_coverage or tuple(part.risk_coverage for part in split.labels)
    risk = [Line(c.name, c.coverage, c.risk, style=k) for k, c in enumerate(by_class)]
    kept = [Line(c.name, c.coverage, c.kept, style=k) for k, c in enumerate(by_class)]
    of = "label" if split.labels else "class"
    charts = [
        line_chart(f"{split.split}: errors within a {of}", risk, _coverage_axes("error rate among kept")),
        line_chart(f"{split.split}: what is kept of a {of}", kept, _coverage_axes(f"share of {of} kept")),
    ]
    legend = [(swatch(k), f"{of} {c.name}") for k, c in enumerate(by_class)]
    if split.alarms is not None:
        alarms, first = split.alarms, len(by_class)
        lines = [
            Line("PPV", alarms.coverage, alarms.ppv, style=first),
            Line("recall", alarms.coverage, alarms.recall, style=first + 1),
        ]
        charts.append(
            line_chart(f"{split.split}: alarms at probability {alarms.threshold:g}", lines, _coverage_axes("PPV, recall"))
        )
        legend += [(swatch(first), "PPV"), (swatch(first + 1), "recall (abstained = missed)")]
    return Figure(tuple(charts), tuple(legend))


def weight_figure(sweep: Sweep, modalities: Sequence[str]) -> Figure:
    """Mean reliability of a modality against the severity with which that modality alone is corrupted."""

    def chart(name: str, lines: list[Line], axes: Axes) -> Markup:
        return line_chart(name, lines, axes, reference=sweep.clean_reliability[name])

    def value(name: str) -> Value:
        return lambda cell: (cell.reliability[name], None, None)

    cells = [cell for cell in sweep.cells if cell.operation not in MISSING]
    starts = {name: sweep.clean_reliability[name] for name in modalities}
    return _panels(cells, modalities, value, starts, "mean weight", chart, y_floor=0.0)


def corruption_figure(sweep: Sweep, modalities: Sequence[str], metrics: TaskMetrics) -> Figure:
    """The primary metric against severity: a panel per modality hit, and one for all at once."""
    start, title_of_metric = sweep.clean[metrics.primary].value, metrics.short_title
    scopes = [*modalities, "all"]

    def chart(name: str, lines: list[Line], axes: Axes) -> Markup:
        title = "all that the operation fits" if name == "all" else f"{name} alone"
        return line_chart(title, lines, axes, reference=start)

    cells = [cell for cell in sweep.cells if cell.operation not in MISSING]
    value = _metric(metrics.primary)
    return _panels(cells, scopes, lambda name: value, dict.fromkeys(scopes, start), title_of_metric, chart)


def missing_figure(sweep: Sweep, metrics: TaskMetrics) -> Figure:
    """The primary metric and NLL against the rate at which modalities go missing."""
    cells = [cell for cell in sweep.cells if cell.operation in MISSING]
    if not cells:
        return Figure(())
    operations = _in_order(cell.operation for cell in cells)
    rates = sorted({0.0, *(float(cell.level) for cell in cells)})
    charts = []
    for metric, title in ((metrics.primary, metrics.short_title), ("nll", "NLL (nats)")):
        start = sweep.clean[metric].value
        lines = [
            _line(operation, [cell for cell in cells if cell.operation == operation], start, _metric(metric), style, by_level=True)
            for style, operation in enumerate(operations)
        ]
        axes = _value_axes(lines, "rate of missing modalities", title, x_ticks=rates, with_whiskers=True, width=320)
        charts.append(line_chart(title, lines, axes, reference=start))
    return Figure(tuple(charts), tuple((swatch(style, with_marker=True), name) for style, name in enumerate(operations)))


def all_operations(evaluation: Evaluation) -> list[str]:
    """Operations of the sweep, in the order of the spec."""
    return _in_order(cell.operation for cell in evaluation.sweep.cells) if evaluation.sweep else []


def _panels(
    cells: Sequence[Cell],
    names: Sequence[str],
    value: Callable[[str], Value],
    starts: dict[str, float | None],
    y_label: str,
    chart: Callable[[str, list[Line], Axes], Markup],
    *,
    y_floor: float | None = None,
) -> Figure:
    """One panel per modality hit, one line per operation, all panels with the same axes."""
    operations = _in_order(cell.operation for cell in cells)
    panels: dict[str, list[Line]] = {}
    for name in names:
        found = {op: [cell for cell in cells if cell.operation == op and cell.modality == name] for op in operations}
        lines = [_line(op, found[op], starts[name], value(name), style) for style, op in enumerate(operations) if found[op]]
        if lines:
            panels[name] = lines
    axes = _value_axes([line for lines in panels.values() for line in lines], "severity", y_label, y_floor=y_floor)
    legend = tuple((swatch(style, with_marker=True), op) for style, op in enumerate(operations))
    return Figure(tuple(chart(name, lines, axes) for name, lines in panels.items()), legend)


def _line(name: str, cells: Sequence[Cell], start: float | None, value: Value, style: int, *, by_level: bool = False) -> Line:
    """A line that begins at the clean value and goes through the cells of one operation."""
    points = [value(cell) for cell in cells]
    return Line(
        name,
        [0.0, *(float(cell.level) if by_level else cell.severity for cell in cells)],
        [start, *(point[0] for point in points)],
        low=[None, *(point[1] for point in points)],
        high=[None, *(point[2] for point in points)],
        style=style,
        markers=True,
    )


def _metric(name: str) -> Value:
    def value(cell: Cell) -> tuple[float | None, float | None, float | None]:
        estimate = cell.metrics[name]
        return estimate.value, estimate.low, estimate.high

    return value


def _diagram(title: str, raw: Diagram, scaled: Diagram, label: str) -> Markup:
    return reliability_diagram(title, raw.bins, scaled.bins, label)


def _coverage_axes(y_label: str) -> Axes:
    return Axes((0, 1), (0, 1), "coverage (share of studies kept)", y_label, UNIT, UNIT)


def _value_axes(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    x_ticks: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
    y_floor: float | None = None,
    with_whiskers: bool = False,
    width: int = 232,
) -> Axes:
    """Axes that hold all points of all lines; whiskers that they were not made for may leave them and are cut."""
    shown = [end for line in lines for end in (line.y, *((line.low, line.high) if with_whiskers else ()))]
    values = [value for column in shown for value in column if value is not None] or [0.0, 1.0]
    low, high = (min(values) if y_floor is None else y_floor), max(values)
    margin = max(0.08 * (high - low), 0.01)
    y_range = (low if y_floor is not None else low - margin, high + margin)
    ticks = [(value, f"{value:g}") for value in x_ticks]
    return Axes((0, max(x_ticks)), y_range, x_label, y_label, ticks, even_ticks(*y_range), width=width, height=200)


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
