"""The table of a benchmark as markdown: results.md."""

from collections.abc import Callable

from draf_dist.evaluation.bench_results import Bench, Row, UnderCondition
from draf_dist.evaluation.scoring import TASKS
from draf_dist.evaluation.statistics import Estimate
from draf_dist.evaluation.task_scores import TaskName

DIGITS = 3
# With intervals; of classes ECE stands beside them with its floor.
METRICS: dict[TaskName, dict[str, str]] = {
    "class": {"auroc": "AUROC", "auprc": "AUPRC", "nll": "NLL", "brier": "Brier"},
    "multilabel": {"auroc": "AUROC", "auprc": "AUPRC", "nll": "NLL", "brier": "Brier", "ece": "ECE"},
    "survival": {"c_index": "C-index", "c_index_ipcw": "C-index (Uno)", "nll": "NLL", "ibs": "Integrated Brier"},
}
EXPLAINED: dict[TaskName, str] = {
    "class": "Brier from 0 to 2; the floor is what ECE a perfectly calibrated model would show.",
    "multilabel": "Means over labels, each over the studies in which it was observed, but for NLL: a mean over studies of that "
    "over their known labels. Brier from 0 to 1.",
    "survival": "Uno's C and Brier are corrected by the censoring of each model's own training subjects. Risks of the models of "
    "two folds are on two scales, which the median fold does not mix.",
}
SHOWN_AS_THEY_ARE = {
    "auroc": "AUROC under every condition",
    "c_index": "C-index under every condition",
    "regret": "Regret in nats: mean KL from the exact posterior",
}
COMPARED = {"auroc": "AUROC", "c_index": "C-index", "nll": "NLL", "regret": "Regret"}
LEVEL = 0.05


def columns_of(task: TaskName) -> tuple[str, ...]:
    """The heads of the table."""
    shown = METRICS[task]
    floor = ("ECE (floor)",) if task == "class" else ()
    return ("system", *shown.values(), *floor, f"{shown[TASKS[task].primary]}, median fold")


def cells_of(row: Row, task: TaskName) -> tuple[str, ...]:
    """One line of the table, by columns_of."""
    intervals = [with_interval(row.metrics[name]) for name in METRICS[task]]
    floor = (f"{_number(row.metrics['ece'].value)} ({_number(row.ece_floor.mean)})",) if task == "class" else ()
    return (row.system, *intervals, *floor, _number(row.primary_median_fold))


def differing_columns_of(task: TaskName) -> tuple[str, ...]:
    """The heads of the table of differences."""
    return ("system", *METRICS[task].values())


def difference_cells_of(row: Row, task: TaskName) -> tuple[str, ...]:
    """One line of the table of differences, by differing_columns_of."""
    return (row.system, *(with_interval(row.differences[name], signed=True) for name in METRICS[task]))


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
        f"model that saw neither its site nor any study of its subject.{_lost(bench)}",
        "",
        *_table(columns_of(about.task), [cells_of(row, about.task) for row in bench.rows]),
        "",
        f"Pooled over the folds after temperature scaling, the mean over training seeds ({_seeds(bench)}). Brackets: 95 % over "
        f"{about.bootstrap:,} resamples of {_drawn(bench)}, the same for all rows. {EXPLAINED[about.task]}",
        "",
        f"Differences to `{about.reference}`, paired; **bold**: p below {LEVEL:g} after Holm's correction for the "
        f"{len(bench.rows) - 1} systems of the column:",
        "",
        *_table(differing_columns_of(about.task), [_marked(row, about.task) for row in bench.rows if row.differences]),
        "",
        *_conditions(bench),
    ]
    return "\n".join(lines)


def _lost(bench: Bench) -> str:
    missing, alone = bench.about.missing_from_start, bench.about.auroc_of_absence
    if missing is None:
        return ""
    what = "the label" if missing.score == "label" else "the first principal score of series and tables"
    law = f" Modalities were missing from the start, more in the sicker by {what}: rate {missing.rate:g}, slope {missing.slope:g}."
    return law if alone is None else f"{law} How many are missing has by itself AUROC {alone:.{DIGITS}f}."


def _marked(row: Row, task: TaskName) -> tuple[str, ...]:
    """The line of differences, as it is printed with Holm's p."""
    return (row.system, *(_difference(row, metric) for metric in METRICS[task]))


def _conditions(bench: Bench) -> list[str]:
    """Under every condition: AUROC and regret, then differences in each metric."""
    if not bench.conditions:
        return []
    lines = []
    for metric, title in SHOWN_AS_THEY_ARE.items():
        lines += _by_condition(bench, metric, f"{title}:", lambda row, metric: with_interval(row.metrics[metric]))
    for metric, title in COMPARED.items():
        lines += _by_condition(bench, metric, f"{title}, difference to `{bench.about.reference}`:", _difference)
    return [
        *lines,
        f"Brackets: 95 % over {bench.about.bootstrap:,} resamples of {_drawn(bench)}. **Bold**: p below {LEVEL:g} "
        f"after Holm's correction for the {len(bench.rows) - 1} systems of its column.",
        "",
    ]


def _by_condition(bench: Bench, metric: str, title: str, cell: Callable[[UnderCondition, str], str]) -> list[str]:
    """One line a system, one column a condition in which the metric is known; nothing where there is none."""
    known = [condition for condition in bench.conditions if metric in condition.rows[0].metrics]
    if not known:
        return []
    lines = [(rows[0].system, *(cell(row, metric) for row in rows)) for rows in zip(*(each.rows for each in known), strict=True)]
    filled = [line for line in lines if any(line[1:])]
    return [title, "", *_table(("system", *(condition.name for condition in known)), filled), ""]


def _difference(row: Row | UnderCondition, metric: str) -> str:
    """Bold where Holm's p is below the level; empty for the reference."""
    if metric not in row.differences:
        return ""
    text = with_interval(row.differences[metric], signed=True)
    return f"**{text}**" if row.holm.get(metric, 1.0) < LEVEL else text


def _seeds(bench: Bench) -> str:
    most = max((row.seeds for row in bench.rows), key=len)
    return f"{len(most)} of a network, 1 of a baseline" if any(row.is_baseline for row in bench.rows) else str(len(most))


def _drawn(bench: Bench) -> str:
    return "subjects and training seeds" if any(len(row.seeds) > 1 for row in bench.rows) else "subjects"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.{DIGITS}f}"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [_line(columns), _line(("---",) * len(columns)), *map(_line, rows)]


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
