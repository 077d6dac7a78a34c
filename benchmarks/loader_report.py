"""From the runs of the loader benchmark to its tables: medians and spread of every arm, and paired ratios of ours to the peers.

Intervals are order-statistic intervals of the median over rounds, which assume nothing of how the figures are distributed: the k-th
smallest to the k-th largest, with the largest k whose coverage is at least 90 %. With 5 rounds that is the range, with 93.75 %.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

LEAST_COVERAGE = 0.9
PEERS = ("mosaicml", "litdata", "webdataset", "webdataset-stream", "raw")
LIBRARIES = PEERS[:-1]


Figures = dict[str, float]


@dataclass(frozen=True)
class Run:
    """What became of one run.

    outcome: "ok", "not installed", "crashed", "stalled" or "wrong" (images that are none of the data), with a detail.
    figures: phase -> name -> what was measured; "process" is what is told once a run. about: versions and settings of the arm.
    """

    round: int
    setting: str
    arm: str
    outcome: str
    detail: str
    peak_pss_mib: float
    figures: dict[str, Figures]
    about: dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """Of a median: low and high, and how often such an interval covers the true one."""

    median: float
    low: float
    high: float
    coverage: float
    n: int


def median_interval(values: Sequence[float]) -> Interval:
    """The median with the narrowest order-statistic interval that covers at least LEAST_COVERAGE, or the range."""
    n, ordered = len(values), sorted(values)
    k, coverage = 1, _coverage(n, 1)
    while k + 1 <= n // 2 and _coverage(n, k + 1) >= LEAST_COVERAGE:
        k, coverage = k + 1, _coverage(n, k + 1)
    return Interval(median(ordered), ordered[k - 1], ordered[n - k], coverage, n)


def _coverage(n: int, k: int) -> float:
    """Probability that the median of a continuous distribution lies between the k-th smallest and the k-th largest of n draws."""
    return 1 - 2 * sum(comb(n, i) for i in range(k)) / 2**n


def figure(run: Run, phase: str, name: str) -> float | None:
    value = run.figures.get(phase, {}).get(name)
    return None if value is None else float(value)


def values_of(runs: Iterable[Run], setting: str, arm: str, phase: str, name: str) -> dict[int, float]:
    """Round -> figure, of the rounds in which it was measured."""
    found = {run.round: figure(run, phase, name) for run in runs if (run.setting, run.arm, run.outcome) == (setting, arm, "ok")}
    return {number: value for number, value in found.items() if value is not None}


@dataclass(frozen=True)
class Ratio:
    """A paired comparison: in every round the figure of `ours` over that of `other`."""

    setting: str
    phase: str
    name: str
    other: str
    interval: Interval


# What ours behind a line is held against: what the proxy costs by itself, and what the distance adds to that.
NEARER = {"s3-proxy": ("s3",), "s3-latency": ("s3", "s3-proxy"), "s3-latency-cap": ("s3", "s3-proxy")}


def ratios(runs: Sequence[Run]) -> list[Ratio]:
    """All that the issue asks for: rates and first batches against every peer and the best of them, the bound, latency, joint."""
    found: list[Ratio] = []
    settings = list(dict.fromkeys(run.setting for run in runs))

    def add(setting: str, phase: str, name: str, other: str, ours: dict[int, float], theirs: dict[int, float]) -> None:
        both = sorted(ours.keys() & theirs.keys())
        if both:
            pairs = [ours[number] / theirs[number] for number in both]
            found.append(Ratio(setting, phase, name, other, median_interval(pairs)))

    for setting in settings:
        for phase in ("cold", "warm"):
            names = ("images_per_s", "first_batch_s") if phase == "cold" else ("images_per_s",)
            for name in names:
                ours = values_of(runs, setting, "ours", phase, name)
                theirs = {arm: values_of(runs, setting, arm, phase, name) for arm in PEERS}
                for arm, values in theirs.items():
                    add(setting, phase, name, arm, ours, values)
                best = min if name == "first_batch_s" else max
                add(setting, phase, name, "best library", ours, _best({arm: theirs[arm] for arm in LIBRARIES}, best))
        bound = values_of(runs, "memory", "decode", "warm", "images_per_s")
        add(setting, "warm", "images_per_s", "decode bound", values_of(runs, setting, "ours", "warm", "images_per_s"), bound)
        for near in NEARER.get(setting, ()):
            ours = values_of(runs, setting, "ours", "cold", "images_per_s")
            add(setting, "cold", "images_per_s", f"ours in {near}", ours, values_of(runs, near, "ours", "cold", "images_per_s"))
        for phase in ("cold", "warm"):
            for name in ("images_per_s", "samples_per_s"):
                joint = values_of(runs, setting, "ours-joint", phase, name)
                add(setting, phase, name, "joint", values_of(runs, setting, "ours", phase, name), joint)
    return found


def _best(arms: dict[str, dict[int, float]], best: Callable[[Iterable[float]], float]) -> dict[int, float]:
    """Round -> the best peer's figure in that round, of the rounds in which any has one."""
    rounds = sorted({number for values in arms.values() for number in values})
    return {number: best(values[number] for values in arms.values() if number in values) for number in rounds}


COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("steady img/s", "steady_images_per_s", 0),
    ("first batch s", "first_batch_s", 2),
    ("CPU-s / 1,000", "cpu_per_1000", 2),
    ("S3 bytes / data", "bytes_over_data", 2),
    ("S3 requests", "requests", 0),
)


def print_tables(console: Console, runs: Sequence[Run], cap_images_per_s: float | None) -> None:
    for setting in dict.fromkeys(run.setting for run in runs):
        for phase in ("cold", "warm"):
            arms = [arm for arm in dict.fromkeys(run.arm for run in runs) if _is_told(runs, setting, arm, phase)]
            if arms:
                console.print(_table(runs, setting, phase, arms, cap_images_per_s if setting.endswith("cap") else None))
    console.print(_ratio_table(ratios(runs)))
    for arm, about in abouts(runs).items():
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        console.print(f"{arm}: {about['settings']}. {versions}", highlight=False)


def abouts(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Arm -> versions and settings, of the arms of which a run has ended well."""
    return {run.arm: run.about for run in runs if run.outcome == "ok"}


def _is_told(runs: Sequence[Run], setting: str, arm: str, phase: str) -> bool:
    mine = [run for run in runs if (run.setting, run.arm) == (setting, arm)]
    return any(phase in run.figures for run in mine) or (phase == "cold" and any(run.outcome != "ok" for run in mine))


def _table(runs: Sequence[Run], setting: str, phase: str, arms: Sequence[str], bound: float | None) -> Table:
    table = Table(title=escape(f"{setting}, {phase}: medians over rounds [quartiles] (least to greatest)"), title_justify="left")
    for heading in ("arm", "img/s", *(heading for heading, _, _ in COLUMNS)):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    if phase == "cold":
        table.add_column("with import s", justify="right")
    table.add_column("peak MiB", justify="right")
    if bound is not None:
        table.add_column("of the cap", justify="right")
    table.add_column("samples", justify="right")
    table.add_column("n")
    for arm in arms:
        table.add_row(*_row(runs, setting, phase, arm, bound))
    return table


def _row(runs: Sequence[Run], setting: str, phase: str, arm: str, bound: float | None) -> list[str]:
    mine = [run for run in runs if (run.setting, run.arm) == (setting, arm)]
    good = [run for run in mine if run.outcome == "ok" and phase in run.figures]

    def of(name: str, where: str = phase) -> list[float]:
        return [value for run in good if (value := figure(run, where, name)) is not None]

    rates = of("images_per_s")
    row = [arm, _spread(rates)] + [_middle(of(name), digits) for _, name, digits in COLUMNS]
    if phase == "cold":
        row.append(_middle(of("first_batch_with_import_s", "process"), 1))
    row.append(_middle([run.peak_pss_mib for run in good], 0))
    if bound is not None:
        row.append(f"{median(rates) / bound:.0%}" if rates else "-")
    return [*row, _exactness(good, phase), _outcomes(mine, len(good))]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return escape(f"{median(values):,.0f} [{low:,.0f}, {high:,.0f}] ({min(values):,.0f} to {max(values):,.0f})")


def _middle(values: Sequence[float], digits: int) -> str:
    return f"{median(values):,.{digits}f}" if values else "-"


def _exactness(good: Sequence[Run], phase: str) -> str:
    """Worst over the rounds: distinct images, repeats and short batches."""
    if not good:
        return "-"
    unique = min(figure(run, phase, "unique") or 0 for run in good)
    repeated, short = (max(figure(run, phase, name) or 0 for run in good) for name in ("repeated", "short_batches"))
    return f"{unique:.0f} + {repeated:.0f}, {short:.0f} short"


def _outcomes(mine: Sequence[Run], num_good: int) -> str:
    bad = [run.outcome for run in mine if run.outcome != "ok"]
    return ", ".join([str(num_good), *(f"{bad.count(outcome)} {outcome}" for outcome in dict.fromkeys(bad))])


def _ratio_table(found: Sequence[Ratio]) -> Table:
    table = Table(title="ours / other in the same round: median of the ratios, interval of the median", title_justify="left")
    for heading in ("setting", "phase", "figure", "other", "ratio", "interval", "coverage", "n"):
        table.add_column(heading)
    for ratio in found:
        value = ratio.interval
        numbers = f"{value.median:.2f}", f"{value.low:.2f} to {value.high:.2f}", f"{value.coverage:.1%}", str(value.n)
        table.add_row(ratio.setting, ratio.phase, ratio.name, ratio.other, *numbers)
    return table
