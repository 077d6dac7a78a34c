"""What no field of a card shows alone. Every check yields its problems, so that all of them are reported together."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from string import Formatter

from draf_dist.errors import SpecError, explain, together
from draf_dist.sources import units
from draf_dist.sources.card_labels import LabelCard
from draf_dist.sources.card_model import (
    Card,
    FileCard,
    ImageCard,
    LocalCode,
    ModalityCard,
    SeriesCard,
    SiteFolders,
    TableCard,
    TableModalityCard,
    VariableCard,
    VolumeCard,
)
from draf_dist.sources.card_parts import token
from draf_dist.sources.card_segmentation import SegmentationCard


def check_card(card: Card, *, where: str) -> None:
    """Checks what no field shows alone: names that must exist, times that must fit, units that must convert.

    Raises:
        SpecError: all problems together, one a line, each beginning with `where`.
    """
    found = list(problems(card))
    if found:
        raise SpecError(together(f"{where}: {problem}" for problem in found))


def problems(card: Card) -> Iterator[str]:
    """Every problem of a card as `place: expected ..., found .... remedy`, in the order of the file."""
    yield from _site_problems(card)
    for name, table in card.tables.items():
        yield from _table_problems(card, name, table)
    yield from _study_problems(card)
    yield from _label_problems(card)
    for alias, unit in card.unit_aliases.items():
        if not _is_unit(unit):
            yield explain(
                f"unit_aliases: {alias}", expected="a known unit", found=repr(unit), remedy="For example mg/dL or 10^9/L."
            )
    yield from _twice("modalities", (modality.name for modality in card.modalities))
    for modality in card.modalities:
        yield from _modality_problems(card, modality)


def _site_problems(card: Card) -> Iterator[str]:
    sites = card.sites
    yield from _unknown("split.held_out_sites", card.split.held_out_sites, sites.names(), "a site of this card")
    if set(card.split.held_out_sites) >= set(sites.names()):
        yield explain("split.held_out_sites", expected="a site left to train on", found="all sites", remedy="Hold out fewer.")
    yield from _twice("sites", sites.names())
    if isinstance(sites, SiteFolders):
        for site in sites.names():
            yield from _path_problems(f"sites.folders: {site}", sites.folder(site), fields=())
        yield from _twice("sites.folders", (sites.folder(site) for site in dict.fromkeys(sites.names())))
        return
    if sites.pattern is not None and not _is_pattern(sites.pattern):
        remedy = r"For example '([^,]+)$' for what follows the last comma."
        yield explain("sites.pattern", expected="a regular expression with one group", found=repr(sites.pattern), remedy=remedy)
    values = (
        value.strip().casefold() for codes in sites.groups.values() for value in ((codes,) if isinstance(codes, str) else codes)
    )
    yield from _twice("sites.groups", values)


def _table_problems(card: Card, name: str, table: TableCard) -> Iterator[str]:
    place = f"tables: {name}"
    yield from _path_problems(place, table.path, fields=("site",) if isinstance(card.sites, SiteFolders) else ())
    yield from _unknown(f"{place}: rename", table.rename, card.sites.names(), "a site of this card")
    if table.rename and "{site}" not in table.path:
        remedy = "Call the columns in the card as the file does."
        yield explain(f"{place}: rename", expected="a path with {site}", found="one file for all sites", remedy=remedy)
    anchor = card.studies.anchor
    if anchor is None and (table.time is not None or table.static):
        remedy = "Add studies.anchor, or take `time` and `static` out."
        yield explain(place, expected="no times, for the card has no anchor", found="`time` or `static`", remedy=remedy)
    if anchor is not None and anchor.number_unit is not None and table.time_format is not None:
        remedy = "Take time_format out, or the anchor's number_unit."
        yield explain(place, expected=f"times as numbers ({anchor.number_unit})", found="time_format", remedy=remedy)


def _study_problems(card: Card) -> Iterator[str]:
    studies = card.studies
    yield from _unknown("studies.table", (studies.table,), card.tables, "one of the tables")
    table = card.tables.get(studies.table)
    if table is None:
        return
    if table.code is not None:
        yield explain(f"tables: {studies.table}", expected="one row per study", found="a long table", remedy="Take `code` out.")
    if isinstance(card.sites, SiteFolders) and "{site}" not in table.path and len(card.sites.names()) > 1:
        remedy = "Put {site} in, or say in which column the site is (sites: {column: ...})."
        yield explain(f"tables: {studies.table}", expected="a path with {site}", found=repr(table.path), remedy=remedy)
    if studies.repeat != "each" and table.subject is None:
        remedy = f"Give tables.{studies.table}.subject."
        yield explain("studies.repeat", expected="a subject column", found=f"repeat: {studies.repeat}", remedy=remedy)
    anchor = studies.anchor
    if anchor is not None and anchor.number_unit is not None and anchor.format is not None:
        yield explain("studies.anchor", expected="either number_unit or format", found="both", remedy="Take one of them out.")


def _label_problems(card: Card) -> Iterator[str]:
    yield from _unknown("label", (card.label,), card.labels, "one of the labels")
    for name, label in card.labels.items():
        if isinstance(label, LabelCard):
            yield from _twice(f"labels: {name}: classes", label.classes)
            yield from _unknown(f"labels: {name}: values", label.values.values(), label.classes, "one of the classes")
        if isinstance(label, SegmentationCard):
            yield from _mask_problems(card, name, label)
        studies = card.tables.get(card.studies.table)
        for column in sorted(label.where.keys() & studies.where.keys()) if studies is not None else ():
            expected, found = "columns that the table's own `where` lacks", f"{column!r} in both"
            yield explain(f"labels: {name}: where", expected=expected, found=found, remedy="Take it out of one of them.")


def _mask_problems(card: Card, name: str, label: SegmentationCard) -> Iterator[str]:
    place = f"labels: {name}"
    volumes = {modality.name: modality for modality in card.modalities if isinstance(modality, VolumeCard)}
    yield from _unknown(f"{place}: modality", (label.modality,), volumes, "one of the modalities of kind volume")
    if name == "json" or name in {modality.name for modality in card.modalities}:
        remedy = "A release names the files of masks after the label."
        yield explain(place, expected="a name that no modality has", found=repr(name), remedy=remedy)
    yield from _path_problems(place, label.path, fields=_file_fields(card))
    image = volumes.get(label.modality)
    if "{file}" not in label.path:
        yield explain(place, expected="a path with {file}", found=repr(label.path), remedy="For example '{site}/masks/{file}'.")
    elif image is not None and (label.path, label.file or image.file) == (image.path, image.file):
        yield explain(
            place, expected="other files than those of the images", found=repr(label.path), remedy="Give those of the masks."
        )


def _file_fields(card: Card) -> tuple[str, ...]:
    return ("site", "file") if isinstance(card.sites, SiteFolders) else ("file",)


def _modality_problems(card: Card, modality: ModalityCard) -> Iterator[str]:
    place = f"modality {modality.name}"
    if modality.name == "json":
        yield explain(place, expected="another name", found="'json'", remedy="A release keeps its own files under this name.")
    yield from _unknown(f"{place}: absent_at", modality.absent_at, card.sites.names(), "a site of this card")
    yield from _unknown(place, (modality.table,), card.tables, "one of the tables")
    table = card.tables.get(modality.table)
    if table is None:
        return
    yield from _join_problems(card, modality, table)
    yield from _time_problems(card, modality, table)
    if isinstance(modality, ImageCard | VolumeCard):
        yield from _file_problems(card, modality, table)
    else:
        yield from _variables_problems(card, modality, table)


def _join_problems(card: Card, modality: ModalityCard, table: TableCard) -> Iterator[str]:
    studies = card.tables.get(card.studies.table)
    if studies is None or modality.table == card.studies.table:
        return
    place = f"modality {modality.name}: table {modality.table}"
    if table.study is None and table.subject is None:
        yield explain(place, expected="a column that joins it to a study", found="none", remedy="Give `study` or `subject`.")
    elif table.study is not None and studies.study is None:
        remedy = f"Give tables.{card.studies.table}.study, or join by `subject`."
        yield explain(place, expected="a study column on both sides", found="one side only", remedy=remedy)
    elif table.study is None and studies.subject is None:
        remedy = f"Give tables.{card.studies.table}.subject."
        yield explain(place, expected="a subject column on both sides", found="one side only", remedy=remedy)


def _time_problems(card: Card, modality: ModalityCard, table: TableCard) -> Iterator[str]:
    place = f"modality {modality.name}: table {modality.table}"
    window = modality.window_h
    if card.studies.anchor is not None and table.time is None and not table.static:
        remedy = "Give `time`; or `static: true` if all of it was known before the event."
        yield explain(place, expected="a time for every row", found="none", remedy=remedy)
    if table.time is None:
        if isinstance(modality, SeriesCard):
            yield explain(place, expected="a table with a `time`", found="none", remedy="A series needs times.")
        elif window is not None:
            yield explain(place, expected="no window, for the rows have no time", found="window_h", remedy="Take it out.")
        return
    if window is None:
        yield explain(
            place, expected="window_h: [start, end]", found="none", remedy="For example [-24, 0], in hours from the anchor."
        )
        return
    if window[0] >= window[1]:
        yield explain(place, expected="a start before the end", found=f"window_h {list(window)}", remedy="For example [-24, 0].")
    if isinstance(modality, SeriesCard) and abs(modality.num_steps * modality.step_h + window[0]) > 1e-6:
        found = f"window_h {list(window)} and step_h {modality.step_h}"
        yield explain(place, expected="a window of whole steps", found=found, remedy="Change step_h or the start of the window.")


def _file_problems(card: Card, image: FileCard, table: TableCard) -> Iterator[str]:
    place = f"modality {image.name}"
    yield from _path_problems(place, image.path, fields=_file_fields(card))
    if "{file}" not in image.path:
        yield explain(place, expected="a path with {file}", found=repr(image.path), remedy="For example '{site}/images/{file}'.")
    if table.code is not None:
        yield explain(place, expected="one row per image", found="a long table", remedy="Take `code` out of the table.")
    if isinstance(image, ImageCard) and image.levels is not None and image.levels[0] >= image.levels[1]:
        yield explain(place, expected="levels [black, white]", found=str(list(image.levels)), remedy="Black is the lower one.")


def _variables_problems(card: Card, modality: SeriesCard | TableModalityCard, table: TableCard) -> Iterator[str]:
    place = f"modality {modality.name}"
    hots = modality.multi_hot if isinstance(modality, TableModalityCard) else ()
    names = [variable.name for variable in modality.variables] + [spec.name for hot in hots for spec in hot.specs()]
    yield from _twice(f"{place}: variables", names)
    if hots and table.code is not None:
        yield explain(
            place, expected="a wide table for multi_hot", found="a long one", remedy="Put multi_hot in a modality of its own."
        )
    for hot in hots:
        for name, code in hot.codes.items():
            yield from _local_problems(card, f"variable {hot.prefix}{name}", code, modality.absent_at)
    if isinstance(modality, TableModalityCard):
        yield from _columns_problems(card, modality, table)
    for variable in modality.variables:
        yield from _variable_problems(card, f"variable {variable.name}", variable, table, modality.absent_at)
        if variable.type == "categorical":
            yield from _category_problems(card, variable, table, modality)
    yield from _label_as_input(card, modality, table)


def _columns_problems(card: Card, modality: TableModalityCard, table: TableCard) -> Iterator[str]:
    for entry in modality.columns:
        place = f"modality {modality.name}: {entry.title()}"
        if table.code is not None:
            remedy = "List its codes as `variables`."
            yield explain(place, expected="a wide table, one column a variable", found="a long one", remedy=remedy)
        if entry.listed is not None:
            yield from _path_problems(place, entry.listed.path, fields=())
        yield from _variable_problems(card, place, entry.rule, table, modality.absent_at)


def _label_as_input(card: Card, modality: SeriesCard | TableModalityCard, table: TableCard) -> Iterator[str]:
    """The column that is to be predicted, read as what it is predicted from."""
    label, studies = card.labels.get(card.label), card.tables.get(card.studies.table)
    if label is None or studies is None or table.path != studies.path or table.code is not None:
        return
    hots = modality.multi_hot if isinstance(modality, TableModalityCard) else ()
    columns = [(variable.name, variable.codes_at(site)) for variable in modality.variables for site in card.sites.names()]
    columns += [(hot.prefix or hot.column, (hot.column,)) for hot in hots]
    for name in dict.fromkeys(name for name, column in columns if set(label.columns) & set(column)):
        found = f"the label's own, {', '.join(map(repr, label.columns))}"
        yield explain(f"variable {name}", expected="another column", found=found, remedy="Take it out: it is what is predicted.")


def _variable_problems(
    card: Card, place: str, variable: VariableCard, table: TableCard, absent_at: tuple[str, ...]
) -> Iterator[str]:
    if variable.code is not None:
        yield from _local_problems(card, place, variable.code, absent_at)
    if isinstance(variable.unit, dict):
        yield from _unknown(f"{place}: unit", variable.unit, card.sites.names(), "a site of this card")
        measured = [site for site in card.sites.names() if site not in absent_at and variable.codes_at(site)]
        if table.unit is None and (lacking := [site for site in measured if site not in variable.unit]):
            yield explain(place, expected="a unit for every site", found=f"none for {', '.join(lacking)}", remedy="Add it.")
    if variable.canonical is None and variable.type == "numeric" and (isinstance(variable.unit, dict) or table.unit is not None):
        yield explain(place, expected="`canonical`, for units vary", found="none", remedy="Give the unit that the release stores.")
        return
    if not _is_unit(variable.canonical_unit):
        found = repr(variable.canonical_unit)
        yield explain(place, expected="a known canonical unit", found=found, remedy="For example mmol/L, bpm, 10^9/L; '' for none.")
        return
    stated = {variable.unit_at(site) for site in card.sites.names()} - {None}
    for unit in sorted(str(unit) for unit in stated):
        try:
            units.conversion(
                card.unit_aliases.get(unit, unit), variable.canonical_unit, variable.molar_mass_g_mol, variable.valence
            )
        except units.UnitError:
            expected = f"a unit convertible to {variable.canonical_unit or 'a plain number'}"
            yield explain(place, expected=expected, found=repr(unit), remedy=conversion_remedy(unit, variable))


def _category_problems(
    card: Card, variable: VariableCard, table: TableCard, modality: SeriesCard | TableModalityCard
) -> Iterator[str]:
    place = f"variable {variable.name}: categories"
    if isinstance(modality, SeriesCard):
        remedy = "Take the last one into a table."
        yield explain(place, expected="a modality of kind table", found="a series, which holds numbers", remedy=remedy)
    for name, words in variable.category_words.items():
        yield from _local_problems(card, f"{place}: {name}", words, modality.absent_at)
    unknown = {token(text) for text in (*card.missing, *table.missing)}
    yield from dict.fromkeys(
        problem for site in card.sites.names() for problem in _word_problems(place, variable.words_at(site), unknown)
    )


def _word_problems(place: str, words: Iterable[tuple[str, int]], unknown: set[str]) -> Iterator[str]:
    meanings: dict[str, int] = {}
    for word, code in words:
        if meanings.setdefault(token(word), code) != code:
            remedy = "Give it to one of them; numbers compare as numbers."
            yield explain(place, expected="every word in one category", found=f"{word!r} in two", remedy=remedy)
        if token(word) in unknown:
            remedy = "Take it out of `missing` (of the card, or of the table), or out of the categories."
            yield explain(place, expected="words that are known", found=f"{word!r}, which means missing", remedy=remedy)


def conversion_remedy(unit: str, variable: VariableCard) -> str:
    """What to do about a unit that does not convert to that of a variable."""
    if not _is_unit(unit):
        return f"Say in unit_aliases what it means ({unit!r}: ...), or correct it."
    bridges = {"Give molar_mass_g_mol.": (1.0, None), "Give valence.": (None, 1)}
    for remedy, (molar_mass, valence) in bridges.items():
        try:
            units.conversion(unit, variable.canonical_unit, molar_mass, valence)
        except units.UnitError:
            continue
        return remedy
    return f"Does the code of {variable.name} stand for something else?"


def _local_problems(card: Card, place: str, code: LocalCode, absent_at: tuple[str, ...]) -> Iterator[str]:
    if isinstance(code, dict):
        yield from _unknown(f"{place}: code", code, card.sites.names(), "a site of this card")
        lacking = [site for site in card.sites.names() if site not in code and site not in absent_at]
        if lacking:
            remedy = "Add it; null says that the site does not record the variable."
            yield explain(place, expected="a code for every site", found=f"none for {', '.join(lacking)}", remedy=remedy)


def _path_problems(place: str, path: str, *, fields: tuple[str, ...]) -> Iterator[str]:
    if not stays_inside(path):
        yield explain(place, expected="a path inside the raw folder", found=repr(path), remedy="No '..', no leading '/', no '\\'.")
    try:
        used = {name for _, name, _, _ in Formatter().parse(path) if name is not None}
    except ValueError:
        used = {path}
    if not used <= set(fields):
        allowed = " and ".join(f"{{{field}}}" for field in fields) or "no {...}"
        yield explain(place, expected=f"a path with {allowed} only", found=repr(path), remedy="Take the other braces out.")


def stays_inside(path: str) -> bool:
    """Whether a relative path can't lead out of the folder it is relative to (links apart)."""
    parts = PurePosixPath(path).parts
    return (
        bool(parts) and not path.startswith("/") and ".." not in parts and "\\" not in path and ":" not in path and "\0" not in path
    )


def _unknown(place: str, names: Iterable[str], known: Iterable[str], expected: str) -> Iterator[str]:
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}."
            yield explain(place, expected=expected, found=repr(name), remedy=remedy)


def _twice(place: str, names: Iterable[str]) -> Iterator[str]:
    for name, count in Counter(names).items():
        if count > 1:
            yield explain(place, expected="every name once", found=f"{name!r} {count} times", remedy="Rename all but one.")


def _is_unit(unit: str) -> bool:
    try:
        units.parse(unit)
    except units.UnitError:
        return False
    return True


def _is_pattern(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups >= 1
    except re.error:
        return False
