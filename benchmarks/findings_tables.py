"""The numbers of findings as markdown."""

import json
from collections.abc import Iterable
from pathlib import Path

from draf_dist.evaluation.bench_results import ConditionResult
from draf_dist.evaluation.statistics import Estimate

# Row -> column; title -> table.
Table = dict[str, dict[str, Estimate]]
Tables = dict[str, Table]


def show_tables(found: Tables, path: Path | None) -> None:
    """Prints them; with a path writes every number there."""
    for title, rows in found.items():
        print(table(title, rows))
    if path:
        path.write_text(
            json.dumps({t: {r: {c: e.model_dump() for c, e in x.items()} for r, x in y.items()} for t, y in found.items()})
        )


def table(title: str, rows: Table) -> str:
    """As markdown."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    head = [f"\n{title}\n", f"| | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    body = [f"| {name} | {' | '.join(show(row.get(column)) for column in columns)} |" for name, row in rows.items()]
    return "\n".join([*head, *body])


def show(one: Estimate | None) -> str:
    """A number with its interval."""
    if one is None or one.value is None:
        return "-"
    return f"{one.value:.3f}" + ("" if one.low is None else f" [{one.low:.3f}, {one.high:.3f}]")


def comparison_tables(results: Iterable[ConditionResult]) -> Tables:
    """Metric, and its differences -> system -> condition -> number."""
    found: Tables = {}
    for result in results:
        for row in result.rows:
            for metric, value in row.metrics.items():
                found.setdefault(metric, {}).setdefault(row.system, {})[result.name] = value
                if row.differences:
                    key = f"{metric}, difference"
                    found.setdefault(key, {}).setdefault(row.system, {})[result.name] = row.differences[metric]
                    holm = Estimate(value=row.holm.get(metric))
                    found.setdefault(f"{metric}, Holm's p", {}).setdefault(row.system, {})[result.name] = holm
    return found
