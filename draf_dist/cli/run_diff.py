"""`draf run diff`."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from draf_dist.cli.output import JsonOption, console, print_json, table

if TYPE_CHECKING:
    from draf_dist.training.run_diff import Differing, PartedTensors, RunDiff

SHOWN = 20


def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="URL of a run folder.")],
    right: Annotated[str, typer.Argument(metavar="B", help="URL of another one.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="Relative differences up to this are none; 1e-6 for another number of ranks.")
    ] = 0.0,
    json: JsonOption = False,
) -> None:
    """Where two runs part: which keys of their jobs differ, and the first step, term and tensor that do. Exits 1 if any does.

    Example: draf run diff runs/first runs/second
    """
    from draf_dist.training.run_diff import diff_runs
    from draf_dist.training.watch.flight import storable

    found = diff_runs(left, right, tolerance=tolerance)
    if json:
        print_json(storable({**asdict(found), "equal": found.equal}))
    else:
        _show(found)
    if not found.equal:
        raise typer.Exit(1)


def _show(found: "RunDiff") -> None:
    _differing("job", found.job)
    _differing("made with", found.made_with)
    if found.steps[0] != found.steps[1]:
        _say(f"A has done {found.steps[0]} steps, B {found.steps[1]}.")
    if found.parted is None:
        _say(f"The numbers of all {found.compared} steps that both have are equal.")
    else:
        what = "validation after step" if found.parted.event == "epoch" else "step"
        _differing(f"the first difference in metrics.jsonl: {what} {found.parted.step}", found.parted.differing)
    if found.tensors is not None:
        _tensors(found.tensors)
    elif found.checkpoints:
        _say(f"The tensors of the checkpoints at {', '.join(map(str, found.checkpoints))} are equal.")
    else:
        _say("There is no checkpoint at a step that both have.")
    _say("Equal." if found.equal else "They differ.")


def _differing(title: str, differing: "Iterable[Differing]") -> None:
    rows = [(each.name, each.left, each.right, _number(each.relative)) for each in differing]
    if rows:
        console.print(table(title, ("", "A", "B", "relative"), rows))


def _tensors(parted: "PartedTensors") -> None:
    title = f"checkpoint at step {parted.step}: {len(parted.tensors)} of {parted.of} tensors differ"
    rows = [(each.name, each.shapes or _number(each.absolute), _number(each.relative)) for each in parted.tensors[:SHOWN]]
    console.print(table(title, ("tensor", "largest difference", "relative"), rows))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
