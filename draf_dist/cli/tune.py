"""`draf tune`: a search campaign."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draf_dist.cli.output import DryRunOption, JsonOption, SetOption, console, print_json, table

if TYPE_CHECKING:
    from draf_dist.tuning.campaign import CampaignResult
    from draf_dist.tuning.campaign_job import CampaignJob
    from draf_dist.tuning.leaderboard import Leaderboard, Row

SHOWN_ROWS = 10


def tune(
    campaign: Annotated[Path, typer.Argument(help="The campaign (YAML).")],
    out: Annotated[str | None, typer.Option(help="URL of the folder; runs/<campaign>-<hash> if not given.")] = None,
    overrides: SetOption = None,
    profile: Annotated[
        Path | None, typer.Option(help="Where a trial trains (YAML, see cluster/); one process if not given.")
    ] = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Search settings of a job. The same command continues; a trial that has ended is not repeated.

    Example: draf tune tune/alpha_lambda_temperature.yaml --set release=data/synth --out runs/campaign
    """
    from rich.console import Console

    from draf_dist.launch.cluster_profile import load_profile
    from draf_dist.tuning.campaign_job import load_campaign

    spec = load_campaign(campaign, overrides or ())
    where = None if profile is None else load_profile(profile)
    if dry_run:
        _describe(spec, out, json=json)
        return
    from draf_dist.tuning.campaign import run_campaign

    result = run_campaign(spec, out, where, Console(stderr=True, quiet=json))
    if json:
        print_json({"campaign": result.url, "winner": result.winner, **result.leaderboard.model_dump(mode="json")})
        return
    print_leaderboard(result.leaderboard)
    _print_next(result)


def print_leaderboard(board: "Leaderboard") -> None:
    """The best trials, and what to know before the winner is believed."""
    columns = ("rank", "trial", "NLL/T", "T", "AUROC", "epochs", "state", "parameters")
    rows = [_row(row) for row in board.rows if row.rank is not None]
    ended = f"{board.finished} finished, {board.stopped} stopped early, {board.failed} failed"
    console.print(table(f"{board.name}: {ended}; least {board.objective} of validation first", columns, rows[:SHOWN_ROWS]))
    if len(rows) > SHOWN_ROWS:
        console.print(f"and {len(rows) - SHOWN_ROWS} more in leaderboard.json")
    for warning in board.warnings:
        console.print(f"note: {warning}", markup=False, highlight=False, soft_wrap=True)


def _print_next(result: "CampaignResult") -> None:
    console.print(f"Report: {result.url}/report.html", soft_wrap=True, highlight=False)
    console.print(f"Winner: trial {result.best.trial}   Next: draf train {result.winner}", soft_wrap=True, highlight=False)


def _describe(spec: "CampaignJob", out: str | None, *, json: bool) -> None:
    from draf_dist.tuning.checks import check_campaign
    from draf_dist.tuning.folder import find_campaign
    from draf_dist.tuning.point import base_value, max_epochs
    from draf_dist.tuning.rungs import milestones, nothing_is_stopped
    from draf_dist.tuning.space import describe

    check_campaign(spec)
    store, there, pinned = find_campaign(spec, out)
    releases = {name: stage.release for name, stage in pinned.stages.items()}
    space = {path: {"values": describe(parameter), "base": base_value(spec, path)} for path, parameter in spec.space.items()}
    rungs = [] if spec.stopping is None else list(milestones(spec.stopping, max_epochs(spec)))
    never = nothing_is_stopped(spec)
    if json:
        about = {"name": spec.name, "trials": spec.budget.trials, "space": space, "rungs": rungs, "releases": releases}
        print_json({**about, "campaign": store.url, "exists": there is not None, "warnings": [never] if never else []})
        return
    rows = [(path, about["values"], about["base"]) for path, about in space.items()]
    console.print(
        table(f"{spec.name}: {spec.budget.trials} trials for the least {spec.objective}", ("parameter", "values", "base job"), rows)
    )
    for name, release in releases.items():
        console.print(f"{name} on {release}", soft_wrap=True, highlight=False)
    console.print(f"{'Continues' if there is not None else 'Folder:'} {store.url}", soft_wrap=True, highlight=False)
    if never is not None:
        console.print(f"note: {never}", markup=False, highlight=False, soft_wrap=True)
    after = ", ".join(map(str, rungs)) or "no"
    console.print(f"Trials are compared, and the worse ones stopped, after {after} epochs.", highlight=False)


def _row(row: "Row") -> tuple[str, ...]:
    numbers = (_number(row.nll_scaled, 4), _number(row.temperature, 2), _number(row.auroc, 3))
    parameters = ", ".join(f"{path.rpartition('.')[2]} {_setting(value)}" for path, value in row.parameters.items())
    return (str(row.rank), str(row.trial), *numbers, str(row.epochs), row.state, parameters)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _setting(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
