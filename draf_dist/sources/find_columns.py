"""Which columns a card's patterns and lists mean: found in the header lines of the export, or those that a release recorded."""

import csv
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from draf_dist.errors import DataError, explain, together
from draf_dist.schema.modality import DataSchema, TableSpec, VariableSpec
from draf_dist.sources.card_columns import ColumnsCard, ListedColumns
from draf_dist.sources.card_model import Card, SiteColumn, TableModalityCard
from draf_dist.sources.tables import find_table, inside

SHOWN = 5


@dataclass(frozen=True)
class TakenColumns:
    """The columns of one entry of `columns`, as the card calls them.

    names: in the order of the release. at: site -> those that it has. left_out: how many that were meant are not taken.
    """

    card: ColumnsCard
    names: tuple[str, ...]
    at: Mapping[str, frozenset[str]]
    left_out: int

    def specs(self) -> tuple[VariableSpec, ...]:
        """The columns as the release describes them."""
        return self.card.specs(self.names)


# Modality -> one for every entry of its `columns`.
Columns = Mapping[str, tuple[TakenColumns, ...]]


def find_columns(card: Card, raw: Path, recorded: DataSchema | None = None) -> Columns:
    """The columns of all modalities that take many at once. Only lists and header lines are read.

    recorded: of the release that the export goes into. Its columns are taken, whatever else the export has.

    Raises:
        DataError: a missing file; nothing that matches at a site; a column that a site lacks, that the study needs for something
            else, or that comes twice. All together.
    """
    headers = _Headers(card, raw)
    found: dict[str, tuple[TakenColumns, ...]] = {}
    problems: dict[str, None] = {}
    for modality in card.modalities:
        if not isinstance(modality, TableModalityCard) or not modality.columns:
            continue
        try:
            columns = {site: headers.of(modality.table, site) for site in card.sites.names() if site not in modality.absent_at}
            known = _recorded(modality, recorded)
            taken = [_taken(f"modality {modality.name}", entry, columns, known, raw) for entry in modality.columns]
            _refuse(_not_free(card, modality, taken))
            found[modality.name] = tuple(taken)
        except DataError as error:
            problems[str(error)] = None
    if problems:
        raise DataError(together(problems))
    return found


class _Headers:
    """Column names of files as the card calls them, each file looked at once."""

    def __init__(self, card: Card, raw: Path) -> None:
        self._card, self._raw = card, raw
        self._read: dict[tuple[str, str], tuple[str, ...]] = {}

    def of(self, table: str, site: str) -> tuple[str, ...]:
        """Of a table at a site, in the order of its file."""
        card = self._card.tables[table]
        folder = self._card.sites.folder(site) if "{site}" in card.path else ""
        if (table, folder) not in self._read:
            header = find_table(self._raw, card, site=site, folder=folder, columns=()).header
            renamed = card.rename.get(site, {})
            self._read[table, folder] = tuple(renamed.get(name, name) for name in header)
        return self._read[table, folder]


def _taken(
    place: str, entry: ColumnsCard, columns: Mapping[str, tuple[str, ...]], recorded: tuple[str, ...] | None, raw: Path
) -> TakenColumns:
    """What an entry means. columns: site -> all that its file has. recorded: all columns of the modality in the release."""
    place = f"{place}: {entry.title()}"
    listed = None if entry.listed is None else entry.listed.columns(_listed_names(entry.listed, raw))
    members = None if listed is None else frozenset(listed)
    # Sites that share a file share its columns too.
    chosen = {names: entry.chosen(names, members) for names in dict.fromkeys(columns.values())}
    at = {site: frozenset(chosen[names]) for site, names in columns.items()}
    _refuse(_nothing_at(place, at))
    there = dict.fromkeys(name for names in chosen.values() for name in names)
    meant = tuple(there) if listed is None else entry.chosen(listed, members)
    if recorded is None:
        names = _kept(place, entry, meant, at)
    else:
        names = entry.chosen(recorded, members)
        if entry.lacking != "not_observed":
            _refuse(_lacking(place, names, at, "Export them too: the release has them. Or say `lacking: not_observed`."))
    kept = frozenset(names)
    return TakenColumns(entry, names, {site: has & kept for site, has in at.items()}, len(frozenset(meant) - kept))


def _kept(place: str, entry: ColumnsCard, meant: tuple[str, ...], at: Mapping[str, frozenset[str]]) -> tuple[str, ...]:
    """The columns of a first release: all, those of any site, or those of every site, as the card says."""
    if entry.lacking == "error":
        remedy = "Say what becomes of them: `lacking: not_observed` or `lacking: leave_out`; or leave them out with `exclude`."
        _refuse(_lacking(place, meant, at, remedy))
    enough = any if entry.lacking == "not_observed" else all
    names = tuple(name for name in meant if enough(name in has for has in at.values()))
    if not names:
        remedy = "Say `lacking: not_observed`, or name sites in absent_at."
        _refuse([explain(place, expected="a column that all sites have", found="none", remedy=remedy)])
    return names


def _nothing_at(place: str, at: Mapping[str, frozenset[str]]) -> Iterator[str]:
    for site, has in at.items():
        if not has:
            remedy = "Correct it; or name the site in absent_at of the modality, if it has none of them."
            yield explain(place, expected=f"columns that match at site {site}", found="none", remedy=remedy)


def _lacking(place: str, names: tuple[str, ...], at: Mapping[str, frozenset[str]], remedy: str) -> Iterator[str]:
    for site, has in at.items():
        if lacking := [name for name in names if name not in has]:
            found = f"{len(lacking)} of {len(names)} missing ({shown(lacking)})"
            yield explain(place, expected=f"every column at site {site}", found=found, remedy=remedy)


def _not_free(card: Card, modality: TableModalityCard, taken: list[TakenColumns]) -> Iterator[str]:
    """Columns that are something else already: who a row belongs to, when, what is predicted; or that come twice."""
    place = f"modality {modality.name}: columns"
    used = _used_otherwise(card, modality.table)
    names = [name for one in taken for name in one.names]
    for name in sorted(set(names) & used.keys()):
        yield explain(place, expected="inputs", found=f"{name!r}, {used[name]}", remedy="Take it out with `exclude`.")
    seen = {variable.name for variable in modality.variables} | {spec.name for hot in modality.multi_hot for spec in hot.specs()}
    twice = []
    for name in names:
        if name in seen:
            twice.append(name)
        seen.add(name)
    if twice:
        remedy = "Take them out of one of the two with `exclude`, or rename the variable."
        yield explain(place, expected="every name once", found=f"{len(twice)} twice ({shown(twice)})", remedy=remedy)


def _used_otherwise(card: Card, name: str) -> dict[str, str]:
    """Column of a table -> what it is. Labels that are not the chosen one count too: they know the future as well."""
    table, studies = card.tables[name], card.tables[card.studies.table]
    joins = {table.time: "a time", table.study: "a study", table.subject: "a subject"}
    used = {column: what for column, what in joins.items() if column is not None}
    if table.path != studies.path:
        return used
    used |= {column: f"the column of label {label}" for label, each in card.labels.items() for column in each.columns}
    if isinstance(card.sites, SiteColumn):
        used[card.sites.column] = "the site"
    if card.studies.anchor is not None and card.studies.anchor.column is not None:
        used[card.studies.anchor.column] = "the event's time"
    return used


def _recorded(modality: TableModalityCard, recorded: DataSchema | None) -> tuple[str, ...] | None:
    """Names of a release's variables that are of `columns`; None where it has no such table, and then schemas will not agree."""
    spec = next((spec for spec in recorded.modalities if spec.name == modality.name), None) if recorded is not None else None
    if not isinstance(spec, TableSpec):
        return None
    num_hot = sum(len(hot.codes) for hot in modality.multi_hot)
    return tuple(one.name for one in spec.variables[len(modality.variables) : len(spec.variables) - num_hot])


def _listed_names(listed: ListedColumns, raw: Path) -> tuple[str, ...]:
    """The names in a list file, in its order."""
    path = inside(raw, listed.path)
    if path is None or not path.is_file():
        remedy = "Check `listed` and --raw."
        raise DataError(explain(listed.path, expected="a list of columns", found="no such file", remedy=remedy))
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            cells = _cells(csv.reader(lines), listed) if listed.column is not None else list(lines)
    except (UnicodeDecodeError, csv.Error) as error:
        remedy = "Save it as UTF-8 text."
        raise DataError(explain(listed.path, expected="a list of columns", found="other bytes", remedy=remedy)) from error
    return tuple(dict.fromkeys(cell.strip() for cell in cells if cell.strip()))


def _cells(rows: Iterator[list[str]], listed: ListedColumns) -> list[str]:
    header = [name.strip() for name in next(rows, [])]
    if listed.column not in header:
        near = difflib.get_close_matches(str(listed.column), header, n=1)
        remedy = f"Did you mean {near[0]!r}?" if near else "Correct `column`."
        raise DataError(
            explain(listed.path, expected=f"a column {listed.column!r}", found=f"the columns {shown(header)}", remedy=remedy)
        )
    place = header.index(listed.column)
    return [row[place] for row in rows if len(row) > place]


def shown(names: Iterable[str]) -> str:
    """The first few of many names, for messages."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _refuse(problems: Iterable[str]) -> None:
    if found := list(problems):
        raise DataError(together(found))
