"""Figures as SVG text: a few chart types, no library, no script, nothing fetched. Colours are told apart by colour-blind eyes."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from draf_dist.evaluation.results import DiagramBin

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#444444", "#7b3294")
DASHES = ("", "6 3", "2 2", "8 3 2 3")
GREY = "#6b7280"
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart; a None breaks it. low and high: ends of the intervals of its points, drawn as whiskers.

    style: of its colour and dashes; None is the dashed grey of references.
    """

    label: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    style: int | None = 0
    markers: bool = False

    @property
    def colour(self) -> str:
        """Its colour."""
        return GREY if self.style is None else COLOURS[self.style % len(COLOURS)]

    @property
    def dash(self) -> str:
        """Its dash pattern, so that lines can be told apart in print too."""
        return "4 3" if self.style is None else DASHES[self.style % len(DASHES)]


@dataclass(frozen=True)
class Band:
    """What lies between two lines over x, in a light colour; a None in either leaves a gap."""

    x: Sequence[float | None]
    low: Sequence[float | None]
    high: Sequence[float | None]
    style: int = 0


@dataclass(frozen=True)
class Axes:
    """The frame of a chart: size in pixels, ranges of the data, labels, ticks (at, text)."""

    x_range: Point
    y_range: Point
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    width: int = 300
    height: int = 220
    left: int = 54
    right: int = 12
    top: int = 26
    bottom: int = 40

    def x(self, value: float) -> float:
        """Pixel of a value on the x axis."""
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Pixel of a value on the y axis."""
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)


def line_chart(
    title: str, lines: Sequence[Line], axes: Axes, *, reference: float | None = None, band: Band | None = None
) -> Markup:
    """Lines over one frame; reference: a value at which a dashed grey level is drawn. band: behind the lines."""
    parts = [_frame(title, axes), *([] if band is None else _areas(band, axes))]
    if reference is not None:
        parts.append(_segment((axes.left, axes.y(reference)), (axes.width - axes.right, axes.y(reference)), GREY, dash="4 3"))
    for line in lines:
        parts += _whiskers(line, axes) + _runs(line, axes) + (_markers(line, axes) if line.markers else [])
    return _svg(title, axes.width, axes.height, parts)


def reliability_diagram(title: str, raw: Sequence[DiagramBin], scaled: Sequence[DiagramBin], x_label: str) -> Markup:
    """Frequency against confidence, raw and temperature-scaled; below, how many studies each scaled bin holds."""
    ticks = [(value / 5, f"{value / 5:.1f}") for value in range(6)]
    axes = Axes((0, 1), (0, 1), x_label, "observed frequency", ticks, ticks, width=320, height=330, bottom=104)
    parts = [_frame(title, axes, x_label_drop=64), _segment((axes.x(0), axes.y(0)), (axes.x(1), axes.y(1)), GREY, dash="4 3")]
    for bins, style in ((raw, 1), (scaled, 0)):
        line = Line("", [b.confidence for b in bins], [b.frequency for b in bins], style=style, markers=True)
        parts += _runs(line, axes, width=1, opacity=0.55) + _bin_markers(bins, line, axes)
    return _svg(title, axes.width, axes.height, parts + _histogram(scaled, axes))


def swatch(style: int, *, with_marker: bool = False) -> Markup:
    """A short piece of line for legends."""
    line = Line("", (), (), style=style)
    piece = _segment((0, 6), (26, 6), line.colour, dash=line.dash, width=2)
    dot = f'<circle cx="13" cy="6" r="3" fill="{line.colour}"/>' if with_marker else ""
    return Markup(f'<svg class="swatch" width="26" height="12" aria-hidden="true">{piece}{dot}</svg>')  # noqa: S704


def even_ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """Ticks at round values inside a range."""
    step = (high - low) / count
    magnitude = 10.0 ** len(str(int(1 / step))) if step < 1 else 1.0
    round_step = next((size / magnitude for size in (1, 2, 5, 10, 20, 50) if size / magnitude >= step), step)
    first = int(low / round_step + 0.999)
    last = int(high / round_step + 1e-9)
    return [(index * round_step, f"{index * round_step:.2f}".rstrip("0").rstrip(".") or "0") for index in range(first, last + 1)]


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> Markup:
    text = escape(title)
    body = "".join(parts)
    # Everything that comes from data has gone through escape() above and below.
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{text}">{body}</svg>'
    )  # noqa: S704


def _frame(title: str, axes: Axes, x_label_drop: int = 0) -> str:
    bottom, right = axes.height - axes.bottom, axes.width - axes.right
    parts = [_text(axes.left, 14, title, anchor="start", css="title")]
    for at, text in axes.y_ticks:
        parts += [
            _segment((axes.left, axes.y(at)), (right, axes.y(at)), "#e5e7eb"),
            _text(axes.left - 6, axes.y(at) + 3.5, text, anchor="end"),
        ]
    for at, text in axes.x_ticks:
        parts += [_segment((axes.x(at), bottom), (axes.x(at), bottom + 4), "#9ca3af"), _text(axes.x(at), bottom + 16, text)]
    middle = (axes.top + bottom) / 2
    parts.append(_segment((axes.left, bottom), (right, bottom), "#9ca3af"))
    parts.append(_text((axes.left + right) / 2, bottom + 32 + x_label_drop, axes.x_label, css="label"))
    parts.append(f'<g transform="rotate(-90 12 {middle:.1f})">{_text(12, middle + 3, axes.y_label, css="label")}</g>')
    return "".join(parts)


def _histogram(bins: Sequence[DiagramBin], axes: Axes) -> list[str]:
    floor, height = axes.height - 40, 40
    most = max((b.count for b in bins), default=1)
    parts = [
        _segment((axes.left, floor), (axes.width - axes.right, floor), "#9ca3af"),
        _text(axes.left - 6, floor - height + 8, str(most), anchor="end"),
    ]
    parts.append(_text(axes.left - 6, floor, "n", anchor="end"))
    for b in bins:
        tall = b.count / most * height
        left, wide = axes.x(b.low) + 0.5, axes.x(b.high) - axes.x(b.low) - 1
        hint = f"<title>{b.count} studies</title>"
        parts.append(
            f'<rect x="{left:.1f}" y="{floor - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="#93b8d6">{hint}</rect>'
        )
    return parts


def _bin_markers(bins: Sequence[DiagramBin], line: Line, axes: Axes) -> list[str]:
    """Discs whose area grows with the number of studies, so that the eye weighs them as it should."""
    most = max((b.count for b in bins), default=1)
    parts = []
    for b in bins:
        hint = f"{b.count} studies: mean confidence {b.confidence:.3f}, frequency {b.frequency:.3f}"
        place = f'cx="{axes.x(b.confidence):.1f}" cy="{axes.y(b.frequency):.1f}" r="{1.5 + 4.5 * (b.count / most) ** 0.5:.1f}"'
        parts.append(f'<circle {place} fill="{line.colour}" fill-opacity="0.8"><title>{escape(hint)}</title></circle>')
    return parts


def _runs(line: Line, axes: Axes, *, width: float = 1.8, opacity: float = 1) -> list[str]:
    """The unbroken pieces of a line."""
    runs: list[list[Point]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if x is None or y is None:
            runs.append([])
        else:
            runs[-1].append((axes.x(x), axes.y(y)))
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    stroke = f'fill="none" stroke="{line.colour}" stroke-width="{width}" stroke-opacity="{opacity}"{dash}'
    hint = f"<title>{escape(line.label)}</title>" if line.label else ""
    points = [" ".join(f"{x:.1f},{y:.1f}" for x, y in run) for run in runs if len(run) > 1]
    return [f'<polyline {stroke} points="{each}">{hint}</polyline>' for each in points]


def _areas(band: Band, axes: Axes) -> list[str]:
    """The unbroken pieces of a band."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for x, low, high in zip(band.x, band.low, band.high, strict=True):
        if x is None or low is None or high is None:
            runs.append([])
        else:
            runs[-1].append((axes.x(x), axes.y(low), axes.y(high)))
    colour = COLOURS[band.style % len(COLOURS)]
    outlines = [[(x, low) for x, low, _ in run] + [(x, high) for x, _, high in reversed(run)] for run in runs if len(run) > 1]
    drawn = [" ".join(f"{x:.1f},{y:.1f}" for x, y in outline) for outline in outlines]
    return [f'<polygon fill="{colour}" fill-opacity="0.15" points="{points}"/>' for points in drawn]


def _markers(line: Line, axes: Axes) -> list[str]:
    parts = []
    for x, y in zip(line.x, line.y, strict=True):
        if x is not None and y is not None:
            hint = escape(f"{line.label}: {y:.3f}")
            place = f'cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3"'
            parts.append(f'<circle {place} fill="{line.colour}"><title>{hint}</title></circle>')
    return parts


def _whiskers(line: Line, axes: Axes) -> list[str]:
    parts = []
    for x, low, high in zip(line.x, line.low, line.high, strict=False):
        if x is not None and low is not None and high is not None:
            bottom, top = max(low, axes.y_range[0]), min(high, axes.y_range[1])
            parts.append(_segment((axes.x(x), axes.y(bottom)), (axes.x(x), axes.y(top)), line.colour, opacity=0.35))
    return parts


def _segment(start: Point, stop: Point, colour: str, *, dash: str = "", width: float = 1, opacity: float = 1) -> str:
    extra = (f' stroke-dasharray="{dash}"' if dash else "") + (f' stroke-opacity="{opacity}"' if opacity < 1 else "")
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{stop[0]:.1f}" y2="{stop[1]:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{extra}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle", css: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(text)}</text>'
