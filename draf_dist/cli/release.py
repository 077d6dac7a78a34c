"""`draf release verify | log`."""

from dataclasses import asdict
from typing import Annotated

import typer

from draf_dist.cli.output import JsonOption, console, print_json, progress, table
from draf_dist.schema.release import SPLITS

app = typer.Typer(no_args_is_help=True)
UrlArgument = Annotated[str, typer.Argument(help="URL of the data set; URL@version for one release.")]


@app.command("verify")
def verify(url: UrlArgument, json: JsonOption = False) -> None:
    """Recompute every checksum, count, statistic and leakage check; stop at the first broken member and name it.

    Exits 3 if anything is broken. Example: draf release verify s3://bucket/synth
    """
    from draf_dist.data.release import open_release
    from draf_dist.data.verify import verify as verify_release

    release = open_release(url)
    with progress() as bar:
        task = bar.add_task("verifying shards", total=len(release.manifest.shards))
        report = verify_release(release, lambda done, total: bar.update(task, completed=done, total=total))
    if json:
        print_json({"release": release.pinned_url, **asdict(report)})
        return
    console.print(
        f"{release.pinned_url} is whole: {report.num_shards} shards, {report.num_members} members, {report.num_samples} studies "
        f"of {report.num_subjects} subjects, {report.size_bytes / 2**20:.1f} MiB. "
        "Checksums, counts, statistics and leakage checks hold.",
        soft_wrap=True,
        highlight=False,
    )


@app.command("log")
def log(url: UrlArgument, json: JsonOption = False) -> None:
    """List the releases of a data set, newest first, with the delivery that each added to its parent.

    Example: draf release log s3://bucket/synth
    """
    from draf_dist.data.release import release_log

    entries = release_log(url)
    if json:
        print_json({"releases": [asdict(entry) for entry in entries]})
        return
    rows = [
        (
            entry.version + (" (HEAD)" if entry.is_head else ""),
            entry.parent or "-",
            *(entry.num_studies.get(split, 0) for split in SPLITS),
            entry.num_quarantined,
            ", ".join(entry.deliveries) or "-",
        )
        for entry in entries
    ]
    console.print(table(url, ("version", "parent", *SPLITS, "quarantined", "delivery"), rows))
