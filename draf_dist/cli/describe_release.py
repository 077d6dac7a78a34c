"""How a release is shown in a terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from draf_dist.cli.output import console, table
from draf_dist.schema.release import SPLITS, Quarantine

if TYPE_CHECKING:
    from draf_dist.sources.base import SourceCounts

Counts = Mapping[str, Mapping[str, Mapping[str, int]]]
SHOWN_REJECTIONS = 5
SHOWN_VARIABLES = 40


def print_counts(counts: Counts, title: str) -> None:
    """Studies and present modalities by site and split."""
    modalities = sorted({name for splits in counts.values() for cell in splits.values() for name in cell} - {"studies"})
    rows = [
        (site, split, cell["studies"], *(cell.get(name, 0) for name in modalities))
        for site, splits in sorted(counts.items())
        for split, cell in sorted(splits.items(), key=lambda item: SPLITS.index(item[0]))
        if cell["studies"]
    ]
    console.print(table(title, ("site", "split", "studies", *modalities), rows))
    if empty := sorted(site for site, splits in counts.items() if not any(cell["studies"] for cell in splits.values())):
        console.print(f"[yellow]No studies at:[/] {', '.join(empty)}.", soft_wrap=True, highlight=False)


def print_source_counts(counts: "SourceCounts") -> None:
    """What became of table rows and values, as far as something was left out or converted."""
    rows = [
        (name, made.observed, made.converted, made.out_of_range, made.unreadable)
        for name, made in sorted(counts.variables.items())
        if made.converted or made.out_of_range or made.unreadable
    ]
    if rows:
        more = rows[SHOWN_VARIABLES:]
        sums = [sum(numbers) for numbers in zip(*(row[1:] for row in more), strict=True)]
        shown = rows[:SHOWN_VARIABLES] + ([(f"{len(more)} more, together", *sums)] if more else [])
        console.print(table("values", ("variable", "kept", "converted", "out of range", "unreadable"), shown))
    for title, number in counts.columns_left_out.items():
        text = f"{title}: {number} left out, for not every site has them, or the release has not."
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    tables = [
        (name, made.rows, made.not_wanted, made.unmatched, made.bad_time, made.outside_window)
        for name, made in sorted(counts.tables.items())
    ]
    if tables:
        console.print(table("rows", ("table", "read", "not wanted", "of no study", "bad time", "outside window"), tables))


def print_nothing_observed(counts: "SourceCounts") -> None:
    """Variables of which a site gave nothing that could be used: most often a wrong code, unit or time format in the card."""
    found = nothing_observed(counts)
    if found:
        listed = "; ".join(f"{name} at {', '.join(sites)}" for name, sites in list(found.items())[:SHOWN_VARIABLES])
        more = len(found) - SHOWN_VARIABLES
        listed += f"; and {more} variables more" if more > 0 else ""
        console.print(
            f"[yellow]Nothing observed:[/] {listed}. Check code, window and time format, of masks the path, in the card.",
            soft_wrap=True,
            highlight=False,
        )


def nothing_observed(counts: "SourceCounts") -> dict[str, list[str]]:
    """Variable -> sites that should record it, by the card, and of which no value could be used."""
    return {name: made.empty_at for name, made in sorted(counts.variables.items()) if made.empty_at}


def print_ignored(ignored: Mapping[str, int]) -> None:
    """Members of foreign tars that the card does not name, by the last part of their extension."""
    if ignored:
        listed = ", ".join(f".{name} {number}" if name else f"without one {number}" for name, number in ignored.items())
        console.print(f"Members that the card does not name: {listed}.", soft_wrap=True, highlight=False)


def print_quarantine(quarantine: Quarantine, counts: Counts, num_duplicates: int = 0) -> None:
    """How many studies were left out, of how many that were read, why, and where the first of them stand.

    counts: of those kept. num_duplicates: of those that were there already; the limit is a share of all three together.
    """
    if not quarantine.studies:
        console.print("Quarantine: none.")
        return
    reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(quarantine.reasons.items()))
    kept = sum(cell["studies"] for splits in counts.values() for cell in splits.values())
    num_read = kept + num_duplicates + len(quarantine.studies)
    share = f"{len(quarantine.studies) / num_read:.1%} of {num_read}"
    console.print(f"Quarantine: {len(quarantine.studies)} studies ({share}): {reasons}.", soft_wrap=True, highlight=False)
    for study in quarantine.studies[:SHOWN_REJECTIONS]:
        console.print(f"  {study.site}: {study.where}: {study.reason}", soft_wrap=True, highlight=False, markup=False)
    if (more := len(quarantine.studies) - SHOWN_REJECTIONS) > 0:
        console.print(f"  and {more} more: quarantine.json of the release lists all.", highlight=False)
