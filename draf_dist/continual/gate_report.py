"""gate.html: a verdict as one self-contained page that needs no network, no script and no server; and verdict.json beside it."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from draf_dist.continual.comparison import Slice
from draf_dist.continual.verdict import Finding, Verdict, counted, name_of
from draf_dist.evaluation.page import fill
from draf_dist.evaluation.plots import even_ticks
from draf_dist.evaluation.report import interval, number, signed
from draf_dist.evaluation.scoring import TASKS
from draf_dist.evaluation.task_scores import TaskName
from draf_dist.storage import Store

TEMPLATE = "gate.html.j2"
VERDICT, REPORT = "verdict.json", "gate.html"
HEADLINES = {"promote": "Promote", "refuse": "Refuse", "cannot_tell": "Cannot tell"}
COLOURS = {"harmed": "#b42318", "non_inferior": "#067647", "open": "#6b7280"}
# Beside NLL and the primary metric.
REPORTED: dict[TaskName, tuple[str, ...]] = {
    "class": ("ece", "brier", "accuracy"),
    "multilabel": ("ece", "brier", "auprc"),
    "survival": ("c_index_ipcw", "ibs"),
}
STATES = {"harmed": "harmed", "non_inferior": "no worse", "open": "open"}
# Forest plot, in pixels.
LEFT, WIDTH, ROW, TOP, BOTTOM = 240, 620, 26, 8, 44


@dataclass(frozen=True)
class Bar:
    """One row of the forest plot, in pixels; x is None where there is nothing to draw."""

    name: str
    num_subjects: int
    y: float
    colour: str
    margin: float
    low: float | None
    x: float | None
    high: float | None


@dataclass(frozen=True)
class Forest:
    """The forest plot: harm by slice with the bounds that decide, against the margins and 0."""

    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    zero: float
    left: int
    right: int
    top: int
    bottom: int
    width: int
    height: int


def render(verdict: Verdict) -> str:
    """The page. All text goes through autoescape."""
    filters = {"number": number, "interval": interval, "signed": signed, "name": name_of, "counted": counted}
    rows = list(zip(verdict.comparison.slices, verdict.findings, strict=True))
    return fill(
        "draf_dist.continual",
        TEMPLATE,
        filters,
        v=verdict,
        task=TASKS[verdict.comparison.task],
        reported=REPORTED[verdict.comparison.task],
        headline=HEADLINES[verdict.decision],
        rows=rows,
        states=STATES,
        colours=COLOURS,
        forest=forest(rows),
    )


def write_verdict(store: Store, verdict: Verdict) -> None:
    """Writes verdict.json and gate.html. The same verdict gives the same bytes."""
    text = json.dumps(verdict.model_dump(mode="json"), indent=1, allow_nan=False)
    store.write(VERDICT, (text + "\n").encode())
    store.write(REPORT, render(verdict).encode())


def forest(rows: list[tuple[Slice, Finding]]) -> Forest:
    """Where everything goes."""
    values = [0.0, *(part.margin for part, _ in rows)]
    values += [value for part, _ in rows for value in (part.lower, part.harm, part.upper) if value is not None]
    room = 0.05 * (max(values) - min(values))
    low, high = min(values) - room, max(values) + room

    def pixel(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * WIDTH, 1)

    bars = tuple(
        Bar(
            name=name_of(part.site),
            num_subjects=part.num_subjects,
            y=TOP + ROW * (row + 0.5),
            colour=COLOURS[finding.state],
            margin=pixel(part.margin),
            low=_end(part, part.lower, LEFT, pixel),
            x=None if part.harm is None else pixel(part.harm),
            high=_end(part, part.upper, LEFT + WIDTH, pixel),
        )
        for row, (part, finding) in enumerate(rows)
    )
    return Forest(
        bars=bars,
        ticks=tuple((pixel(at), text) for at, text in even_ticks(low, high, count=10)),
        zero=pixel(0.0),
        left=LEFT,
        right=LEFT + WIDTH,
        top=TOP,
        bottom=TOP + ROW * len(rows),
        width=LEFT + WIDTH + 20,
        height=TOP + ROW * len(rows) + BOTTOM,
    )


def _end(part: Slice, bound: float | None, edge: float, pixel: Callable[[float], float]) -> float | None:
    """Where a line ends: at the edge of the plot where nothing bounds the harm, nowhere where there is no line."""
    if part.lower is None and part.upper is None:
        return None
    return edge if bound is None else pixel(bound)
