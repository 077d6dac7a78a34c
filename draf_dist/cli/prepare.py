"""`draf prepare`: a raw export, or WebDataset tars, and a card to a release."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from draf_dist.cli.describe_release import (
    nothing_observed,
    print_counts,
    print_ignored,
    print_nothing_observed,
    print_quarantine,
    print_source_counts,
)
from draf_dist.cli.output import DryRunOption, JsonOption, SetOption, console, print_json, progress
from draf_dist.cli.subject_key import subject_key
from draf_dist.errors import SpecError, explain

if TYPE_CHECKING:
    from draf_dist.data.gather import Progress
    from draf_dist.data.parts import Counts
    from draf_dist.data.prepare import Inspection
    from draf_dist.data.release import Release
    from draf_dist.schema.release import Quarantine

_FOREIGN = "WebDataset tars, to be indexed where they lie: a folder, a tar, a pattern (*), or names with braces ({000..099})."


def prepare(  # noqa: PLR0913 - every one is an option of the command line
    card: Annotated[Path, typer.Argument(help="The card (YAML) that says what the data mean.")],
    out: Annotated[str, typer.Option(help="URL of the data set to write: a folder or s3://bucket/prefix.")],
    raw: Annotated[Path | None, typer.Option(help="Folder of a raw export, to be read and written as shards.")] = None,
    from_webdataset: Annotated[str | None, typer.Option(metavar="URL", help=_FOREIGN)] = None,
    limit: Annotated[float, typer.Option(min=0, max=1, help="Share of studies that may go to quarantine before it stops.")] = 0.05,
    jobs: Annotated[int, typer.Option(min=1, help="How many to work at once; the release is the same.")] = 1,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Turn a raw export, or WebDataset tars where they lie, into a release: checked, split by subject, bad studies quarantined.

    Example: draf prepare datasets/synth.yaml --raw data/raw --out s3://bucket/synth

    Example: draf prepare card.yaml --from-webdataset "s3://bucket/train-{000..099}.tar" --out s3://bucket/indexed --jobs 8
    """
    if (raw is None) == (from_webdataset is None):
        given = "none" if raw is None else "both"
        remedy = "Give the folder of a raw export, or the URL of tars."
        raise SpecError(explain("draf prepare", expected="one of --raw and --from-webdataset", found=given, remedy=remedy))
    with termination_as_interrupt(), progress() as bar:
        task = bar.add_task("reading and writing studies", total=None)

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        options = _Options(card, overrides or (), out, limit, jobs, dry_run, show)
        found = _from_export(raw, options) if raw is not None else _from_tars(from_webdataset or "", options)
    if json:
        summary = {"release": found.pinned_url, "counts": found.counts, "quarantined": found.quarantine.reasons}
        print_json({**summary, **found.more})
        return
    print_counts(found.counts, "would be written" if found.pinned_url is None else found.pinned_url)
    found.show()
    print_quarantine(found.quarantine, found.counts)
    if found.pinned_url is None:
        console.print("Dry run: nothing was written.")
    else:
        console.print(f"Next: draf train {_job(found.name)} --set release={out}", soft_wrap=True)


@dataclass(frozen=True)
class _Options:
    """What both ways need."""

    card: Path
    overrides: Sequence[str]
    out: str
    limit: float
    jobs: int
    dry_run: bool
    on_progress: "Progress"


@dataclass(frozen=True)
class _Prepared:
    """What was found. pinned_url: None after a dry run. more: for --json; show: prints the same for people."""

    name: str
    pinned_url: str | None
    counts: "Counts"
    quarantine: "Quarantine"
    more: dict[str, object]
    show: Callable[[], None]


def _from_export(raw: Path, options: _Options) -> _Prepared:
    from draf_dist.data.prepare import inspect_source
    from draf_dist.data.prepare import prepare as prepare_release
    from draf_dist.sources.card import load_card

    if not raw.is_dir():
        found = "a file" if raw.exists() else "nothing"
        raise SpecError(explain(str(raw), expected="the folder of the raw export", found=found, remedy="Check --raw."))
    source = load_card(options.card, options.overrides).build(raw)
    key = subject_key(public=source.public_subject_key)

    def show() -> None:
        print_source_counts(source.counts)
        print_nothing_observed(source.counts)

    work = inspect_source if options.dry_run else prepare_release
    result = work(source, options.out, subject_key=key, limit=options.limit, on_progress=options.on_progress, jobs=options.jobs)
    return _prepared(source.name, result, {"nothing_observed": nothing_observed(source.counts)}, show)


def _from_tars(url: str, options: _Options) -> _Prepared:
    from draf_dist.data.foreign import ForeignTars, inspect_foreign, prepare_foreign
    from draf_dist.executor import Processes, Serial
    from draf_dist.sources.card import load_card
    from draf_dist.sources.webdataset_card import WebDatasetCard

    card = load_card(options.card, options.overrides)
    if not isinstance(card, WebDatasetCard):
        remedy = "See docs/webdataset.md."
        raise SpecError(explain(str(options.card), expected="a card of kind webdataset", found=card.kind, remedy=remedy))
    source = ForeignTars(card, url)
    key = subject_key(public=source.public_subject_key)
    executor = Serial() if options.jobs == 1 else Processes(options.jobs)
    work = inspect_foreign if options.dry_run else prepare_foreign
    result = work(source, options.out, subject_key=key, limit=options.limit, on_progress=options.on_progress, executor=executor)
    ignored = dict(source.ignored.most_common())

    def show() -> None:
        print_ignored(ignored)
        console.print("The tars stay where they are, and the release holds as long as they stay as they are.", soft_wrap=True)

    return _prepared(source.name, result, {"ignored_members": ignored}, show)


def _prepared(name: str, result: "Release | Inspection", more: dict[str, object], show: Callable[[], None]) -> _Prepared:
    from draf_dist.data.release import Release

    if isinstance(result, Release):
        return _Prepared(name, result.pinned_url, result.manifest.counts, result.quarantine(), more, show)
    return _Prepared(name, None, result.counts, result.quarantine, more, show)


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
