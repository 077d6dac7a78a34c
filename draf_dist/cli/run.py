"""`draf run show | report | trace`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from draf_dist.cli.output import JsonOption, console, print_json, table
from draf_dist.errors import SpecError, explain

if TYPE_CHECKING:
    from draf_dist.data.loader_stats import LoaderStats
    from draf_dist.training.goodput import Goodput
    from draf_dist.training.journal import Line

app = typer.Typer(no_args_is_help=True)
RunArgument = Annotated[str, typer.Argument(help="URL of the run folder.")]


@app.command("show")
def show(run: RunArgument, json: JsonOption = False) -> None:
    """How a run stands: steps, attempts, epochs consumed whole, validation, where the wall time went, what went wrong.

    Example: draf run show runs/first
    """
    from draf_dist.training.summary import summarise

    summary = summarise(run)
    if json:
        print_json(asdict(summary))
        return
    complete = "release unreadable" if summary.epochs_complete is None else f"{summary.epochs_complete} whole"
    planned = {None: "release unreadable", True: "as planned", False: "not as planned"}[summary.as_planned]
    planned += f", but {summary.left_out} samples were left out" if summary.left_out else ""
    rows = [
        ("state", summary.state),
        ("release", summary.release),
        ("attempts", summary.attempts),
        ("steps", summary.steps),
        ("source epochs", f"{len(summary.samples)}, {complete}"),
        ("receipts", planned),
        *([] if summary.labelled is None else [("labels used", f"those of {summary.labelled} training studies")]),
        ("checkpoints at", ", ".join(map(str, summary.checkpoints)) or "-"),
        *_waiting_rows(summary.goodput),
        *_data_rows(summary.data, ""),
        *_data_rows(summary.validation, "validation: "),
    ]
    console.print(table(f"{summary.name}: {summary.url}", ("", ""), rows))
    console.print(table("wall time", ("", "seconds", "share"), _time_rows(summary.goodput)))
    if summary.goodput.failures:
        console.print(table("failures", ("attempt", "why", "steps lost", "s lost", "s to restart"), _failure_rows(summary.goodput)))
    if summary.skipped or summary.slow:
        console.print(table("noticed", ("step", "what"), [*map(_skipped_row, summary.skipped), *map(_slow_row, summary.slow)]))
    epochs = [
        (e["epoch"], e["step"], f"{e[summary.score]:.4f}", "best" if e["step"] == summary.best_step else "") for e in summary.epochs
    ]
    console.print(table("validation", ("epoch", "step", summary.score, ""), epochs))
    for warning in summary.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)


def _waiting_rows(found: "Goodput") -> list[tuple[str, str]]:
    trained = found.seconds["data_wait"] + found.seconds["step"]
    waited = [("waiting for data", f"{found.seconds['data_wait'] / trained:.1%} of the training time")] if trained else []
    between = "-" if found.mtbf_s is None else f"{found.mtbf_s:.0f} s"
    return [
        *waited,
        ("goodput", f"{found.ettr:.1%} of the wall time in steps that count"),
        ("samples per second", f"{found.samples_per_s:,.1f} of the wall time"),
        ("steps lost", str(found.lost_steps)),
        ("planned stops", ", ".join(f"{why}: {count}" for why, count in found.stops.items()) or "-"),
        ("between failures", between),
    ]


def _time_rows(found: "Goodput") -> list[tuple[str, str, str]]:
    rows = [(kind.replace("_", " "), seconds) for kind, seconds in found.seconds.items()]
    return [
        (name, f"{seconds:.1f}", f"{seconds / max(found.wall_s, 1e-9):.1%}") for name, seconds in [*rows, ("all", found.wall_s)]
    ]


def _failure_rows(found: "Goodput") -> list[tuple[int, str, int, str, str]]:
    return [(each.attempt, each.why, each.lost_steps, f"{each.lost_s:.1f}", f"{each.restart_s:.1f}") for each in found.failures]


def _skipped_row(line: "Line") -> tuple[str, str]:
    return f"{line['start'] + 1} to {line['stop']}", f"update skipped: {line['why']}"


def _slow_row(line: "Line") -> tuple[str, str]:
    own, others = line["own_s"], line["others_s"]
    return str(line["step"]), f"rank {line['rank']} slow: {own:.3f} s for {line['of']}, the others {others:.3f} s"


def _data_rows(data: "LoaderStats", prefix: str) -> list[tuple[str, str]]:
    """What loaders did, as far as there is anything to tell."""
    rows = []
    if data.hit_rate is not None:
        fetched = f"{data.read_bytes / 1e6:.1f} MB in {data.requests} requests, {data.retries} of them again"
        rows += [("read from the store", fetched), ("blocks found in the cache", f"{data.hit_rate:.1%}")]
    elif data.read_bytes:
        rows.append(("read from the disk", f"{data.read_bytes / 1e6:.1f} MB"))
    if data.left_out:
        rows.append(("left out", f"{data.left_out} of {data.members} members (left_out/ in the run folder)"))
    return [(f"{prefix}{name}", value) for name, value in rows]


@app.command("report")
def report(run: RunArgument, out: Annotated[Path, typer.Option(help="File to write.")] = Path("report.html")) -> None:
    """Render the report of an evaluated run again, from its evaluation.json, into a file here.

    Example: draf run report s3://bucket/runs/first --out first.html
    """
    from draf_dist.evaluation.evaluate import read_evaluation
    from draf_dist.evaluation.report import render
    from draf_dist.training.run_folder import open_run

    folder = open_run(run)
    evaluation = read_evaluation(folder.store)
    if evaluation is None:
        raise SpecError(explain(folder.url, expected="an evaluated run", found="no evaluation.json", remedy=f"draf evaluate {run}"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(evaluation), encoding="utf-8")
    console.print(f"Report: {out}", soft_wrap=True, highlight=False)


@app.command("trace")
def trace(
    run: RunArgument,
    uid: Annotated[str, typer.Argument(help="uid of a study: 16 hex digits, as in member names and predictions.")],
    json: JsonOption = False,
) -> None:
    """At which epochs, steps and ranks a study was used in training, computed from the order, without logs.

    Example: draf run trace runs/first 00ab34cd56ef7890
    """
    from draf_dist.training.trace import trace as trace_uid

    uses = trace_uid(run, _parse_uid(uid))
    if json:
        print_json({"uid": uid, "uses": [asdict(use) for use in uses]})
        return
    if not uses:
        console.print(f"{uid} was not used in training: it is in another split, or its step has not come yet.")
        return
    rows = [(use.source or "release", use.epoch, use.step, use.entry, f"{use.rank} of {use.world}") for use in uses]
    console.print(table(f"uses of {uid}", ("source", "epoch", "step", "entry of batch", "rank"), rows))


def _parse_uid(text: str) -> int:
    try:
        uid = int(text, 16)
    except ValueError:
        uid = -1
    if len(text) != 16 or not 0 <= uid < 2**63:
        raise SpecError(
            explain(
                "uid", expected="16 hex digits", found=repr(text), remedy="Take it from predictions/*.parquet or a member name."
            )
        )
    return uid
