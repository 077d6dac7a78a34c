"""`draf submit`: a job to a run on a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from draf_dist.cli.output import DryRunOption, JsonOption, SetOption, console, errors, print_json, table
from draf_dist.errors import DrafError, InterruptedRunError, SpecError, explain

if TYPE_CHECKING:
    from draf_dist.launch.bundle import Bundle
    from draf_dist.launch.cluster_profile import ClusterProfile
    from draf_dist.launch.package import Package
    from draf_dist.launch.ray_jobs import Submission

SHOWN_FILES = 10


def submit(  # noqa: PLR0913 - every one is an option of the command line
    job: Annotated[Path, typer.Argument(help="The job (YAML).")],
    cluster: Annotated[Path, typer.Option(help="The cluster (YAML, see cluster/profiles).")],
    out: Annotated[str | None, typer.Option(help="URL of the run folder; <storage>/<job>-<hash> if not given.")] = None,
    overrides: SetOption = None,
    status: Annotated[bool, typer.Option("--status", help="Say how the newest submission of this job stands.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop it; it writes a checkpoint first.")] = False,
    render: Annotated[
        Literal["kuberay", "aws", "gcp"] | None, typer.Option(help="Print a manifest for this platform instead.")
    ] = None,
    with_code: Annotated[bool, typer.Option("--with-code", help="Upload draf_dist too, to run instead of the image's.")] = False,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Don't wait for the end.")] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Submit a job to a running Ray cluster and follow it. Given again it follows the job that runs, or continues its run.

    The token is read from RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. See docs/clusters.md.

    Example: draf submit jobs/finetune_synth.yaml --cluster cluster/profiles/laptop.yaml --set epochs=5
    """
    from draf_dist.launch.bundle import bundle
    from draf_dist.launch.cluster_profile import load_cluster
    from draf_dist.training.jobs import load_job

    _check_one_of({"--status": status, "--stop": stop, "--render": render is not None, "--dry-run": dry_run})
    _check_one_of({"--render": render is not None, "--json": json})
    where = load_cluster(cluster)
    what = bundle(load_job(job, overrides or ()), where, out)
    if render is not None:
        from draf_dist.launch.render import render as rendered

        typer.echo(rendered(render, where, what), nl=False)
    elif status:
        _status(what, where, json=json)
    elif stop:
        _stop(what, where, json=json)
    else:
        from draf_dist.launch.package import pack

        package = pack(what, with_code=with_code)
        _show_package(what, where, package, quiet=json)
        if not dry_run:
            _submit(what, where, package, wait=not no_follow, json=json)
        elif json:
            print_json({"name": what.name, "run": what.run_url, "files": dict(package.sizes), "size_bytes": package.total})


def _check_one_of(given: dict[str, bool]) -> None:
    named = [name for name, is_given in given.items() if is_given]
    if len(named) > 1:
        raise SpecError(explain(" ".join(named), expected="one of them", found=f"{len(named)}", remedy="Leave the others out."))


def _show_package(what: "Bundle", where: "ClusterProfile", package: "Package", *, quiet: bool) -> None:
    """Before anything is sent. On standard error where standard output is for a machine."""
    rows = [(path, f"{size:,}") for path, size in package.sizes[:SHOWN_FILES]]
    if len(package.files) > SHOWN_FILES:
        rows.append((f"{len(package.files) - SHOWN_FILES} smaller ones", f"{sum(n for _, n in package.sizes[SHOWN_FILES:]):,}"))
    shown = errors if quiet else console
    shown.print(table(f"upload to {where.dashboard}", ("file", "bytes"), [*rows, ("all", f"{package.total:,}")]))
    shown.print(f"Run: {what.run_url}", soft_wrap=True, highlight=False)


def _submit(what: "Bundle", where: "ClusterProfile", package: "Package", *, wait: bool, json: bool) -> None:
    from draf_dist.launch.ray_jobs import check_succeeded, follow, submit

    _warn_of_clear_text(where)
    begun = submit(what, where, package)
    shown = errors if json else console
    if begun.already:
        shown.print(f"{begun.id} is {begun.state} already; no other one is started.", soft_wrap=True, highlight=False)
    else:
        shown.print(f"Submitted as {begun.id}.", soft_wrap=True, highlight=False)
    if wait:
        with _left_running(begun):
            begun = follow(begun, where, lambda line: typer.echo(line, err=json))
    if json:
        print_json(_as_json(begun))
    elif not wait:
        console.print("The same command follows it; with --status it says how it stands, with --stop it stops it.")
    if wait:
        check_succeeded(begun)


@contextmanager
def _left_running(submission: "Submission") -> Iterator[None]:
    """Ctrl-C ends the following, not the job."""
    try:
        yield
    except KeyboardInterrupt:
        remedy = "It goes on: the same command follows it again, --stop stops it."
        raise InterruptedRunError(explain(submission.id, expected="to be followed", found="Ctrl-C", remedy=remedy)) from None


def _warn_of_clear_text(where: "ClusterProfile") -> None:
    from draf_dist.launch.bundle import is_this_machine

    if where.dashboard.startswith("http:") and not is_this_machine(where.dashboard):
        errors.print("warning: over http the token can be read on the way. Use a tunnel (docs/clusters.md).", soft_wrap=True)


def _status(what: "Bundle", where: "ClusterProfile", *, json: bool) -> None:
    from draf_dist.launch.ray_jobs import status

    found = _known(status(what.name, where), what)
    run = _run_folder(found.run_url)
    if json:
        print_json({**_as_json(found), "run_folder": run})
        return
    rows = [
        ("state", found.state),
        ("run", found.run_url),
        ("began", _time(found.began)),
        ("ended", _time(found.ended)),
        ("exit code", "-" if found.exit_code is None else found.exit_code),
        *([("reason", found.reason)] if found.state == "FAILED" else []),
        *((f"run folder: {key}", value) for key, value in run.items()),
    ]
    console.print(table(found.id, ("", ""), rows))


def _stop(what: "Bundle", where: "ClusterProfile", *, json: bool) -> None:
    from draf_dist.launch.ray_jobs import stop

    errors.print(f"Stopping {what.name}: it finishes its step and writes a checkpoint.", soft_wrap=True, highlight=False)
    found = _known(stop(what.name, where), what)
    if json:
        print_json(_as_json(found))
    else:
        console.print(f"{found.id} is {found.state}. Submitted again, the run continues.", soft_wrap=True, highlight=False)


def _known(found: "Submission | None", what: "Bundle") -> "Submission":
    if found is None:
        remedy = "Submit it; a cluster that was started anew knows of none, but the run folder does (draf run show)."
        raise SpecError(explain(what.name, expected="a submission of this job on this cluster", found="none", remedy=remedy))
    return found


def _run_folder(url: str) -> dict[str, Any]:
    """What the run folder itself says, where this machine reaches it."""
    from draf_dist.training.summary import summarise

    try:
        summary = summarise(url)
    except DrafError as error:
        return {"state": f"not to be seen from here ({type(error).__name__})"}
    return {"state": summary.state, "steps": summary.steps, "epochs": len(summary.epochs), "attempts": summary.attempts}


def _as_json(found: "Submission") -> dict[str, Any]:
    return {key: value for key, value in asdict(found).items() if key != "message"}


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds")
