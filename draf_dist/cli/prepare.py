"""`draf prepare`: a raw export and its card to a release."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from draf_dist.cli.describe_release import (
    nothing_observed,
    print_counts,
    print_nothing_observed,
    print_quarantine,
    print_source_counts,
)
from draf_dist.cli.output import DryRunOption, JsonOption, SetOption, console, print_json, progress
from draf_dist.cli.subject_key import subject_key
from draf_dist.errors import SpecError, explain


def prepare(
    card: Annotated[Path, typer.Argument(help="The card (YAML) that describes the raw export.")],
    raw: Annotated[Path, typer.Option(help="Folder of the raw export.")],
    out: Annotated[str, typer.Option(help="URL of the data set to write: a folder or s3://bucket/prefix.")],
    limit: Annotated[float, typer.Option(min=0, max=1, help="Share of studies that may go to quarantine before it stops.")] = 0.05,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Turn a raw export into a release: units converted, ranges checked, subjects split, bad studies quarantined.

    Example: draf prepare datasets/synth.yaml --raw data/raw --out s3://bucket/synth
    """
    from draf_dist.data.prepare import inspect_source
    from draf_dist.data.prepare import prepare as prepare_release
    from draf_dist.sources.card import load_card

    if not raw.is_dir():
        found = "a file" if raw.exists() else "nothing"
        raise SpecError(explain(str(raw), expected="the folder of the raw export", found=found, remedy="Check --raw."))
    source = load_card(card, overrides or ()).build(raw)
    key = subject_key(public=source.public_subject_key)
    with termination_as_interrupt(), progress() as bar:
        task = bar.add_task("reading and writing studies", total=None)

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        if dry_run:
            inspection = inspect_source(source, out, subject_key=key, limit=limit, on_progress=show)
            counts, quarantine, pinned = inspection.counts, inspection.quarantine, None
        else:
            release = prepare_release(source, out, subject_key=key, limit=limit, on_progress=show)
            counts, quarantine, pinned = release.manifest.counts, release.quarantine(), release.pinned_url
    if json:
        missing = nothing_observed(source.counts)
        print_json({"release": pinned, "counts": counts, "quarantined": quarantine.reasons, "nothing_observed": missing})
        return
    print_counts(counts, "would be written" if pinned is None else pinned)
    print_source_counts(source.counts)
    print_nothing_observed(source.counts)
    print_quarantine(quarantine, counts)
    if pinned is None:
        console.print("Dry run: nothing was written.")
    else:
        console.print(f"Next: draf train {_job(source.name)} --set release={out}", soft_wrap=True)


def _job(name: str) -> Path:
    """The job written for a data set; where there is none, one to start from."""
    own = Path("jobs") / f"finetune_{name}.yaml"
    return own if own.is_file() else Path("jobs") / "finetune_synth.yaml"


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Inside the block SIGTERM ends the program as Ctrl-C does: what lies in the temporary folder is removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
