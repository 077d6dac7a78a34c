"""`draf ingest`: a sealed delivery of a hospital into a release."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draf_dist.cli.describe_release import (
    nothing_observed,
    print_counts,
    print_nothing_observed,
    print_quarantine,
    print_source_counts,
)
from draf_dist.cli.output import DryRunOption, JsonOption, SetOption, console, print_json, progress
from draf_dist.cli.prepare import termination_as_interrupt
from draf_dist.cli.subject_key import subject_key

if TYPE_CHECKING:
    from draf_dist.continual.ingest import Ingested
    from draf_dist.sources.base import Source


def ingest(
    card: Annotated[Path, typer.Argument(help="The card (YAML) that describes the delivery.")],
    delivery: Annotated[Path, typer.Argument(help="The sealed folder: raw files and delivery.json.")],
    release: Annotated[str, typer.Option(help="URL of the data set to add to: a folder or s3://bucket/prefix.")],
    limit: Annotated[float, typer.Option(min=0, max=1, help="Share of studies that may go to quarantine before it stops.")] = 0.05,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Add a hospital's sealed delivery to a release: what is new becomes a child release that shares its parent's shards.

    The same delivery again changes nothing. What else is promised: docs/deliveries.md.
    Example: draf ingest new/card.yaml new/delivery --release s3://bucket/synth
    """
    from draf_dist.continual.ingest import ingest as ingest_delivery
    from draf_dist.continual.ingest import inspect_delivery
    from draf_dist.data.release import open_release
    from draf_dist.sources.card import load_card
    from draf_dist.sources.delivery import card_of_sites, read_delivery
    from draf_dist.sources.hospital_export import HospitalExportCard

    sites = read_delivery(delivery).sites
    loaded = load_card(card, overrides or ())
    if isinstance(loaded, HospitalExportCard):
        # What the card takes by pattern was settled when the release was made.
        recorded = open_release(release).schema if loaded.takes_columns else None
        source: Source = card_of_sites(loaded, sites).build(delivery, recorded)
    else:
        source = loaded.build(delivery)
    key = subject_key(public=source.public_subject_key)
    with termination_as_interrupt(), progress() as bar:
        task = bar.add_task("checking files", total=None)

        def show(done: int, total: int | None) -> None:
            bar.update(task, description="reading and writing studies", completed=done, total=total)

        work = inspect_delivery if dry_run else ingest_delivery
        found = work(source, delivery, release, subject_key=key, limit=limit, on_progress=show)
    if json:
        print_json(_summary(found, source, dry_run=dry_run))
    else:
        _print(found, source, dry_run=dry_run)


def _summary(found: "Ingested", source: "Source", *, dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "verdict": found.verdict,
        "release": found.release.pinned_url,
        "parent": found.release.manifest.parent,
        "delivery": found.delivery.model_dump(),
        "counts": _sites_with_studies(found),
        "quarantined": found.quarantine.reasons,
        "nothing_observed": nothing_observed(source.counts),
    }


def _print(found: "Ingested", source: "Source", *, dry_run: bool) -> None:
    delivery, newest = found.delivery, found.release.pinned_url
    if found.verdict == "already there":
        console.print(f"Delivery {delivery.delivery_id} is in {newest} already: nothing to do.", soft_wrap=True, highlight=False)
        return
    if delivery.num_studies:
        print_counts(_sites_with_studies(found), f"{'would be added by' if dry_run else 'added by'} {delivery.delivery_id}")
    print_source_counts(source.counts)
    print_nothing_observed(source.counts)
    print_quarantine(found.quarantine, found.counts, delivery.num_duplicates)
    console.print(f"In the release already, with the same content: {delivery.num_duplicates} studies.", highlight=False)
    if dry_run:
        console.print(f"Dry run: nothing was written; the newest release is {newest}.", soft_wrap=True, highlight=False)
    elif found.verdict == "nothing new":
        console.print(f"Nothing new: recorded in {newest}, with the studies of its parent.", soft_wrap=True, highlight=False)
    else:
        console.print(f"Newest release: {newest}, after {found.release.manifest.parent}.", soft_wrap=True, highlight=False)


def _sites_with_studies(found: "Ingested") -> dict[str, dict[str, dict[str, int]]]:
    """Without the sites that the delivery says nothing of."""
    return {site: splits for site, splits in found.counts.items() if any(cell["studies"] for cell in splits.values())}
