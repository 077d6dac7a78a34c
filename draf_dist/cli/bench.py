"""`draf bench`: systems and baselines on the same folds, one table with intervals and paired differences."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from draf_dist.cli.output import DryRunOption, JsonOption, SetOption, console, errors, print_json, table
from draf_dist.cli.prepare import termination_as_interrupt
from draf_dist.cli.subject_key import subject_key
from draf_dist.errors import SpecError, explain

if TYPE_CHECKING:
    from rich.table import Table

    from draf_dist.evaluation.bench_cell import Cell, CellResult
    from draf_dist.evaluation.bench_job import BenchJob
    from draf_dist.evaluation.bench_results import Bench
    from draf_dist.executor import Executor
    from draf_dist.launch.profile import RayProfile


# Of the table's columns; those of all tasks.
SHOWN = ("system", "AUROC", "C-index", "NLL", "ECE (floor)", "ECE", "Integrated Brier")
EXECUTORS = ("serial", "processes", "ray")
ExecutorOption = Annotated[
    str,
    typer.Option(
        help=f"Where cells run: {', '.join(EXECUTORS)} (processes:4 for four at a time), or a profile of kind ray (YAML)."
    ),
]


def bench(
    job: Annotated[Path, typer.Argument(help="The benchmark (YAML).")],
    raw: Annotated[Path, typer.Option(help="Folder of the raw export that the benchmark's card describes.")],
    out: Annotated[str | None, typer.Option(help="URL of the folder; runs/<name>-<hash> if not given.")] = None,
    truth: Annotated[Path | None, typer.Option(help="Folder `truth` of `draf synth`: also report regret.")] = None,
    executor: ExecutorOption = "processes",
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Compare systems out of fold, each site held out once. The same command continues; finished cells are not repeated.

    Example: draf bench jobs/bench_eicu.yaml --raw data/eicu_demo --out runs/bench_eicu
    """
    from draf_dist.evaluation.bench import REPORT, default_folder, prepare_bench, run_bench
    from draf_dist.evaluation.bench_job import load_bench_job
    from draf_dist.sources.card import load_card
    from draf_dist.sources.synth.truth import posterior_by_uid

    spec = load_bench_job(job, overrides or ())
    if not raw.is_dir():
        there = "a file" if raw.exists() else "nothing"
        raise SpecError(explain(str(raw), expected="the folder of the raw export", found=there, remedy="Check --raw."))
    key = subject_key(public=load_card(spec.card).split.public_subject_key)
    folder = out or default_folder(spec, key)
    if dry_run:
        _describe(spec, folder, json=json)
        return
    chosen, planted = choose_executor(executor, folder), None if truth is None else posterior_by_uid(truth, key)
    lines = _Lines()
    with termination_as_interrupt():
        prepared = prepare_bench(spec, raw, folder, key, lines)
        found = run_bench(prepared, chosen, lines, planted)
    if json:
        print_json(found.model_dump(mode="json"))
        return
    print_bench(found)
    console.print(f"Report: {folder.rstrip('/')}/{REPORT}", soft_wrap=True, highlight=False)


def print_bench(bench: "Bench") -> None:
    """The table and the differences to the reference."""
    from draf_dist.evaluation.bench_report import cells_of, columns_of, difference_cells_of, differing_columns_of

    # As many columns as a terminal of 80 shows without breaking names; the report has all.
    about = bench.about
    columns, differences = columns_of(about.task), differing_columns_of(about.task)
    shown = [number for number, name in enumerate(columns) if name in SHOWN]
    differing_shown = [number for number, name in enumerate(differences) if name in SHOWN[:4]]
    title = f"{about.name}: {about.num_studies} studies out of fold, with 95 % intervals over subjects"
    console.print(_some(title, columns, [cells_of(row, about.task) for row in bench.rows], shown))
    differing = [difference_cells_of(row, about.task) for row in bench.rows if row.differences]
    if differing:
        console.print(_some(f"difference to {about.reference}, paired", differences, differing, differing_shown))


def _some(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], shown: list[int]) -> "Table":
    return table(title, [columns[number] for number in shown], [[row[number] for number in shown] for row in rows])


def _describe(spec: "BenchJob", folder: str, *, json: bool) -> None:
    cells = spec.folds * (len(spec.systems) * len(spec.seeds) + len(spec.baselines))
    if json:
        about = {"folder": folder, "rows": list(spec.names), "folds": spec.folds, "seeds": list(spec.seeds), "cells": cells}
        print_json({**about, "conditions": list(spec.conditions)})
        return
    seeds = f"{len(spec.seeds)} seed{'s' * (len(spec.seeds) > 1)}"
    what = f"{', '.join(spec.names)} on {spec.folds} folds with {seeds}: {cells} cells"
    conditions = f", each also under {', '.join(spec.conditions)}," if spec.conditions else ""
    console.print(f"Would run {what}{conditions} into {folder}.", soft_wrap=True, highlight=False)


class _Lines:
    """One line a fold and cell, on standard error."""

    def fold(self, number: int, num_folds: int) -> None:
        """A fold's release is there."""
        _say(f"fold {number} of {num_folds} prepared")

    def cell(self, cell: "Cell", result: "CellResult", finished: int, total: int) -> None:
        """A cell is finished."""
        nll = result.temperature.nll_scaled
        validation = "" if nll is None else f"validation NLL {nll:.4f}, "
        _say(f"{finished} of {total} cells: {cell.name}: {validation}{result.wall_s:.0f} s")

    def failed(self, cell: "Cell", message: str) -> None:
        """A cell failed; the others go on."""
        _say(f"failed: {cell.name}: {message}")

    def scoring(self) -> None:
        """Intervals are being computed."""
        _say("all cells are finished; resampling subjects")


def _say(line: str) -> None:
    errors.print(escape(line), highlight=False, soft_wrap=True)


def choose_executor(text: str, folder: str) -> "Executor":
    """The executor that `--executor` names; `folder` is the URL where cells are written.

    Raises:
        SpecError: there is none of that name, or the profile is not one of kind ray.
    """
    from draf_dist.executor import Processes, Serial

    if text.endswith((".yaml", ".yml")):
        return _ray_executor(_ray_profile(Path(text)), folder)
    name, _, number = text.partition(":")
    if name not in EXECUTORS or not (number or "1").isdecimal() or number == "0" or (name == "serial" and number):
        remedy = "For example --executor processes:4."
        expected = f"one of {', '.join(EXECUTORS)}, or a profile (YAML)"
        raise SpecError(explain("--executor", expected=expected, found=repr(text), remedy=remedy))
    workers = int(number) if number else len(os.sched_getaffinity(0))
    if name == "ray":
        from draf_dist.launch.profile import RayProfile

        return _ray_executor(RayProfile(workers=workers), folder)
    return Serial() if name == "serial" else Processes(workers)


def _ray_executor(profile: "RayProfile", folder: str) -> "Executor":
    # Ray takes seconds to import; who does not use it does not wait for it.
    from draf_dist.launch.ray_executor import RayExecutor

    return RayExecutor(profile, folder)


def _ray_profile(path: Path) -> "RayProfile":
    from draf_dist.launch.cluster_profile import load_profile
    from draf_dist.launch.profile import RayProfile

    found = load_profile(path)
    if not isinstance(found, RayProfile):
        remedy = "Use serial or processes for this machine."
        raise SpecError(explain(str(path), expected="a profile of kind ray", found=found.kind, remedy=remedy))
    return found
