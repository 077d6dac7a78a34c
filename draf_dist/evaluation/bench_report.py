"""The table of a benchmark as markdown: results.md."""

from draf_dist.evaluation.bench_results import Bench, Row
from draf_dist.evaluation.statistics import Estimate

COLUMNS = ("system", "AUROC", "AUPRC", "NLL", "Brier", "ECE (floor)", "AUROC, median fold")
DIFFERENCES = ("system", "AUROC", "AUPRC", "NLL", "Brier")
DIGITS = 3


def cells_of(row: Row) -> tuple[str, ...]:
    """One line of the table, by COLUMNS."""
    floor = "-" if row.ece_floor.mean is None else f"{row.ece_floor.mean:.{DIGITS}f}"
    intervals = [with_interval(row.metrics[name]) for name in ("auroc", "auprc", "nll", "brier")]
    return (row.system, *intervals, f"{_number(row.metrics['ece'].value)} ({floor})", _number(row.auroc_median_fold))


def difference_cells_of(row: Row) -> tuple[str, ...]:
    """One line of the table of differences, by DIFFERENCES."""
    return (row.system, *(with_interval(row.differences[name], signed=True) for name in ("auroc", "auprc", "nll", "brier")))


def with_interval(estimate: Estimate, *, signed: bool = False) -> str:
    """A number and its 95 % interval."""
    if estimate.value is None:
        return "-"
    sign = "+" if signed else ""
    value = f"{estimate.value:{sign}.{DIGITS}f}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{estimate.low:{sign}.{DIGITS}f}, {estimate.high:{sign}.{DIGITS}f}]"


def markdown(bench: Bench) -> str:
    """A section that stands alone: what was compared, the table, the differences."""
    about = bench.about
    counts = ", ".join(f"{count} {name}" for name, count in zip(about.classes, about.class_counts, strict=True))
    lines = [
        f"## {about.name}",
        "",
        f"{about.num_studies:,} studies of {about.num_subjects:,} subjects at {about.num_sites} sites of `{about.data}`; "
        f"label `{about.label}`: {counts}. {len(about.folds)} folds of whole sites; every study is predicted once per seed, by a "
        "model that saw neither its site nor any study of its subject.",
        "",
        *_table(COLUMNS, [cells_of(row) for row in bench.rows]),
        "",
        f"Pooled over the folds after temperature scaling, the mean over training seeds ({_seeds(bench)}). Brackets: 95 % over "
        f"{about.bootstrap:,} resamples of subjects, the same for all rows. Brier from 0 to 2; the floor is what ECE a perfectly "
        "calibrated model would show.",
        "",
        f"Differences to `{about.reference}`, paired:",
        "",
        *_table(DIFFERENCES, [difference_cells_of(row) for row in bench.rows if row.differences]),
        "",
    ]
    return "\n".join(lines)


def _seeds(bench: Bench) -> str:
    most = max((row.seeds for row in bench.rows), key=len)
    return f"{len(most)} of a network, 1 of a baseline" if any(row.is_baseline for row in bench.rows) else str(len(most))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.{DIGITS}f}"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [_line(columns), _line(("---",) * len(columns)), *map(_line, rows)]


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
