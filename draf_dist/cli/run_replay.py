"""`draf run replay`."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from draf_dist.cli.output import JsonOption, console, errors, print_json, progress, table

if TYPE_CHECKING:
    from draf_dist.training.replay import Replay

# The rows that bring most to the loss, unless --json asks for all.
SHOWN = 20


def replay(
    run: Annotated[str, typer.Argument(help="URL of the run folder.")],
    step: Annotated[int, typer.Option(help="The step, as metrics.jsonl counts: the first is 1.")],
    json: JsonOption = False,
) -> None:
    """Do one step of a run again, in this process and on the CPU, from the newest checkpoint before it; nothing is written.

    Shows its loss, terms and gradient beside what was recorded, and what every row brings to the loss.

    Example: draf run replay runs/first --step 12
    """
    from draf_dist.training.replay import replay as replay_step
    from draf_dist.training.watch.flight import storable

    with progress() as bar:
        task = bar.add_task("steps", total=None)
        found = replay_step(
            run,
            step,
            warn=lambda message: errors.print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True),
            told=lambda done, wanted: bar.update(task, completed=done, total=wanted),
        )
    if json:
        print_json(storable({**asdict(found), "agrees": found.agrees}))
        return
    from_where = f"the checkpoint at step {found.start}" if found.start else "the beginning"
    console.print(table(f"step {step} of {found.url}, from {from_where}", ("", "replayed", "recorded"), _numbers(found)))
    rows = sorted(found.rows, key=lambda row: -abs(row.loss or 0.0))
    names = sorted({name for row in rows for name in row.terms})
    shown = [
        (row.uid, "-" if row.rank < 0 else row.rank, *map(_number, (row.loss, *map(row.terms.get, names)))) for row in rows[:SHOWN]
    ]
    title = "rows" if len(rows) <= SHOWN else f"{SHOWN} of {len(rows)} rows, those that bring most to the loss (--json has all)"
    console.print(table(title, ("uid", "rank", "part of the loss", *names), shown))
    console.print(_verdict(found), highlight=False, soft_wrap=True)


def _numbers(found: "Replay") -> Iterator[tuple[str, str, str]]:
    recorded = found.recorded or {}
    yield "loss", _number(found.loss), _number(recorded.get("loss"))
    for name, value in found.terms.items():
        yield name, _number(value), _number(recorded.get("terms", {}).get(name))
    yield "gradient norm", _number(found.gradient_norm), _number(recorded.get("gradient_norm"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.9g}"


def _verdict(found: "Replay") -> str:
    if found.skipped is not None:
        return f"The run skipped this step's update: {found.skipped}."
    if found.difference is None:
        return "metrics.jsonl does not have this step."
    if found.difference == 0:
        return "Equal to what was recorded, bit for bit."
    ranks = f"{found.world} ranks did it then"
    if found.agrees:
        return f"Equal to what was recorded up to {found.difference:.1e} (relative): {ranks}."
    return f"Not what was recorded: {found.difference:.1e} apart (relative), {ranks}. See docs/troubleshooting.md."
