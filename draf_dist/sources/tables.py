"""CSV files as columns of text, and text as numbers, times and classes: whole columns at once, nothing guessed."""

import csv
import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from draf_dist.errors import DataError, explain, together
from draf_dist.sources.card_checks import stays_inside
from draf_dist.sources.card_model import TableCard
from draf_dist.sources.card_parts import token as token
from draf_dist.sources.packed import opened

MICROSECONDS = {"minute": 60_000_000, "hour": 3_600_000_000, "day": 86_400_000_000}
MICROSECONDS_PER_HOUR = MICROSECONDS["hour"]
# Times that are not known; far from anything that a hospital records.
NO_TIME = np.iinfo(np.int64).min
LISTED_COLUMNS = 20
MIN_BLOCK_BYTES, BLOCK_BYTES_A_COLUMN = 2**20, 2**10
_LAST_NUMBER_OF_HOURS = 24 * 366 * 1000
FIRST_DATE_US, LAST_DATE_US = (int(np.datetime64(date, "us").astype(np.int64)) for date in (datetime.min, datetime.max))


@dataclass(frozen=True)
class Table:
    """Rows of one file. columns: name (as the card calls it) -> text, blanks at the ends dropped.

    row: int64 (n,), the number of each row as a spreadsheet shows it. missing: strings that mean "not known". not_wanted: rows that
    the card's `where` left out.
    """

    file: str
    columns: dict[str, pa.Array]
    row: NDArray[np.int64]
    missing: tuple[str, ...]
    decimal: str = "."
    not_wanted: int = 0

    @property
    def num_rows(self) -> int:
        """The number of rows, n."""
        return len(self.row)

    def text(self, column: str) -> pa.Array:
        """A column with null where its value is not known."""
        values = self.columns[column]
        return pc.if_else(pc.is_in(values, value_set=pa.array(self.missing, pa.string())), pa.scalar(None, pa.string()), values)

    def where(self, row: int) -> str:
        """The place of a row, for messages: a file and a row number, never a subject."""
        return f"{self.file} row {self.row[row]}"


@dataclass(frozen=True)
class TableFile:
    """A site's file of one table and what is in it. columns: name that the card uses -> name in the file."""

    path: Path
    file: str
    header: tuple[str, ...]
    columns: dict[str, str]


def find_table(raw: Path, card: TableCard, *, site: str, folder: str, columns: Iterable[str]) -> TableFile:
    """The file of a table at a site, seen to have the columns; only its first line is read.

    Raises:
        DataError: no such file, a column that is not there or there twice, text in another encoding.
    """
    file = card.path.replace("{site}", folder)
    path = inside(raw, file)
    if path is None or not path.is_file():
        raise DataError(explain(file, expected="a CSV file", found="no such file", remedy="Check the card's path and --raw."))
    header = _header(path, file, card)
    local = {name: raw_name for raw_name, name in card.rename.get(site, {}).items()}
    needed = {name: local.get(name, name) for name in sorted({*columns, *card.where})}
    _check_columns(file, list(needed.values()), header, card)
    return TableFile(path, file, tuple(header), needed)


def read_table(found: TableFile, card: TableCard, *, missing: tuple[str, ...]) -> Table:
    """The columns of a file, rows filtered by `where`.

    Raises:
        DataError: rows of unequal length, text in another encoding.
    """
    loaded, row = _load(found, card)
    texts = {name: loaded[column] for name, column in found.columns.items()}
    table = Table(found.file, texts, row, (*missing, *card.missing), card.decimal)
    _refuse_long_cells(table, card)
    return _filtered(table, card)


def inside(raw: Path, relative: str) -> Path | None:
    """The path below the raw folder, or None where it leads out of it, by `..`, as an absolute path or through a link."""
    if not stays_inside(relative):
        return None
    path = (raw / relative).resolve()
    return path if path.is_relative_to(raw.resolve()) else None


def lookup(texts: pa.Array, function: Callable[[str], float]) -> NDArray[np.float64]:
    """function(text) of every cell, evaluated once per different text; NaN where null."""
    encoded = texts.dictionary_encode()
    values = np.array([function(text) for text in encoded.dictionary.to_pylist()] + [np.nan], np.float64)
    return np.asarray(values[np.asarray(encoded.indices.fill_null(len(values) - 1))])


def numbers(texts: pa.Array, *, decimal: str = ".") -> NDArray[np.float64]:
    """Cells as numbers; NaN where null or no finite number."""
    if decimal == ",":
        # Beside decimal commas a point groups thousands, or it is a mistake: 1.234 may be either number, so it is none.
        texts = pc.if_else(pc.match_substring(texts, "."), "?", pc.replace_substring(texts, ",", "."))
    try:
        values = np.asarray(texts.cast(pa.float64()).fill_null(np.nan))
    except pa.ArrowInvalid:
        values = lookup(texts, _number)
    return np.where(np.isfinite(values), values, np.nan)


def mapped(texts: pa.Array, values: Mapping[str, float]) -> NDArray[np.float64]:
    """Cells through a table of values, compared as tokens; NaN where null or not in it."""
    by_token = {token(text): value for text, value in values.items()}
    return lookup(texts, lambda text: by_token.get(token(text), np.nan))


def times(texts: pa.Array, *, time_format: str | None, number_unit: str | None, decimal: str = ".") -> NDArray[np.int64]:
    """Cells as microseconds (since 1970 for dates, as written, no time zone; from the event for numbers); NO_TIME where unknown."""
    if number_unit is not None:
        return _from_numbers(numbers(texts, decimal=decimal), MICROSECONDS[number_unit])
    if time_format is not None:
        return _from_format(texts, time_format)
    try:
        return _from_stamps(texts.cast(pa.timestamp("us")))
    except pa.ArrowInvalid:
        return _one_by_one(texts, datetime.fromisoformat)


def _from_format(texts: pa.Array, time_format: str) -> NDArray[np.int64]:
    """The C library reads 31 February as 3 March, so a time counts only if it is written back as it stood; else Python decides."""
    if any(code in time_format for code in ("%f", "%z", "%Z")):
        return _one_by_one(texts, lambda text: datetime.strptime(text, time_format))
    stamps = pc.strptime(texts, format=time_format, unit="s", error_is_null=True)
    sure = pc.equal(pc.strftime(stamps, format=time_format), texts).fill_null(False)
    doubtful = pc.if_else(sure, pa.scalar(None, pa.string()), texts)
    slow = _one_by_one(doubtful, lambda text: datetime.strptime(text, time_format))
    return np.where(np.asarray(sure), _from_stamps(stamps.cast(pa.timestamp("us"))), slow)


def _one_by_one(texts: pa.Array, read: Callable[[str], datetime]) -> NDArray[np.int64]:
    """Microseconds of every cell, each different text read once; NO_TIME where null or not to be read."""
    encoded = texts.dictionary_encode()
    stamps = np.array([_microseconds(text, read) for text in encoded.dictionary.to_pylist()] + [NO_TIME], np.int64)
    return np.asarray(stamps[np.asarray(encoded.indices.fill_null(len(stamps) - 1))])


def _from_numbers(values: NDArray[np.float64], unit_us: int) -> NDArray[np.int64]:
    known = np.isfinite(values) & (np.abs(values) < _LAST_NUMBER_OF_HOURS * MICROSECONDS_PER_HOUR / unit_us)
    scaled = np.rint(np.where(known, values, 0) * unit_us).astype(np.int64)
    return np.where(known, scaled, NO_TIME)


def _from_stamps(stamps: pa.Array) -> NDArray[np.int64]:
    return np.asarray(stamps.cast(pa.int64()).fill_null(NO_TIME))


def _number(text: str) -> float:
    try:
        # Python's own 1_000 is no way to write a measurement.
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def _microseconds(text: str, read: Callable[[str], datetime]) -> int:
    try:
        stamp = read(text)
    except ValueError:
        return int(NO_TIME)
    # A time with a zone beside times without one has no defined distance to them.
    if stamp.tzinfo is not None:
        return int(NO_TIME)
    return int(np.datetime64(stamp, "us").astype(np.int64))


def _header(path: Path, file: str, card: TableCard) -> list[str]:
    if card.header is not None:
        return list(card.header)
    encoding = "utf-8-sig" if card.encoding == "utf-8" else card.encoding
    try:
        with opened(path, file) as content, TextIOWrapper(content, encoding=encoding, newline="") as lines:
            rows = csv.reader(lines, delimiter=card.delimiter)
            return [name.strip() for name in next((row for row in rows if row), [])]
    except UnicodeDecodeError as error:
        raise _wrong_encoding(file, card) from error
    except csv.Error as error:
        raise DataError(explain(file, expected="a line of column names", found=str(error), remedy=_QUOTES)) from error


_QUOTES = "Check the delimiter and the quotes (one that is opened and never closed swallows the lines behind it)."


def _wrong_encoding(file: str, card: TableCard) -> DataError:
    return DataError(explain(file, expected=f"{card.encoding} text", found="other bytes", remedy="Set `encoding` of the table."))


def _check_columns(file: str, needed: list[str], header: list[str], card: TableCard) -> None:
    if not header:
        remedy = "Export it again; a table without rows still has its line of column names."
        raise DataError(explain(file, expected="a line of column names", found="an empty file", remedy=remedy))
    if needed and not set(needed) & set(header):
        # It may be a line of data, and then its cells are a patient's: they are not shown.
        other = [mark for mark in ",;\t|" if mark != card.delimiter and len(header) == 1 and mark in header[0]]
        remedy = f"Set `delimiter: {other[0]!r}`." if other else "If it has no line of names, give `header`; else use `rename`."
        known = ", ".join(map(repr, needed[:LISTED_COLUMNS])) + (", ..." if len(needed) > LISTED_COLUMNS else "")
        found = f"none of them among its {len(header)} columns"
        raise DataError(explain(f"{file} first line", expected=f"the columns {known}", found=found, remedy=remedy))
    found = ", ".join(header)
    found = found if len(found) <= 400 else f"{found[:400]}..."
    problems = []
    times_there = Counter(header)
    for name in needed:
        if times_there[name] > 1:
            problems.append(explain(file, expected=f"one column {name!r}", found="several", remedy="Name columns differently."))
        elif name not in times_there:
            near = difflib.get_close_matches(name, header, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Correct the card, or use `rename` for this site."
            problems.append(explain(file, expected=f"a column {name!r}", found=f"the columns {found}", remedy=hint))
    if problems:
        raise DataError(together(problems))


def _load(found: TableFile, card: TableCard) -> tuple[dict[str, pa.Array], NDArray[np.int64]]:
    """The needed columns, and the number of each row as a spreadsheet shows it. Rows that say nothing in them are left out."""
    header, needed, times_there = found.header, sorted(set(found.columns.values())), Counter(found.header)
    unequal: list[tuple[int, int]] = []
    blank: list[int] = []

    def note(row: Any) -> str:
        if row.actual_columns == 1 and not row.text.strip():
            blank.append(row.number)
        else:
            unequal.append((row.number, row.actual_columns))
        return "skip"

    # Columns get unique names by position, for exports repeat names in columns that nobody needs.
    names = [name if times_there[name] == 1 else f"{position}:{name}" for position, name in enumerate(header)]
    # A block of a wide table is as large as a hundred rows or so: every column of every block has its price.
    block_size = max(MIN_BLOCK_BYTES, BLOCK_BYTES_A_COLUMN * len(header))
    read = pa_csv.ReadOptions(column_names=names, skip_rows=0, encoding=card.encoding, use_threads=False, block_size=block_size)
    # Empty lines are kept here, or the rows behind them would get wrong numbers.
    parse = pa_csv.ParseOptions(
        delimiter=card.delimiter, newlines_in_values=True, invalid_row_handler=note, ignore_empty_lines=False
    )
    convert = pa_csv.ConvertOptions(
        column_types={name: pa.string() for name in needed},
        include_columns=needed,
        strings_can_be_null=False,
        quoted_strings_can_be_null=False,
    )
    try:
        with opened(found.path, found.file) as content:
            table = pa_csv.read_csv(content, read_options=read, parse_options=parse, convert_options=convert)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise _unparsable(found.file, card, str(error)) from error
    if unequal:
        number, columns = unequal[0]
        rows = f"{len(unequal)} rows with another number (the first is row {number} with {columns})"
        remedy = f"{_QUOTES} A card with `header` must name every column."
        raise DataError(explain(found.file, expected=f"{len(header)} columns in every row", found=rows, remedy=remedy))
    row = np.delete(np.arange(1, table.num_rows + len(blank) + 1, dtype=np.int64), np.array(blank, np.int64) - 1)
    says = np.zeros(table.num_rows, bool)
    trimmed = {name: pc.utf8_trim_whitespace(table[name].combine_chunks()) for name in needed}
    for texts in trimmed.values():
        says |= np.asarray(pc.not_equal(texts, ""))
    kept = np.flatnonzero(says)[0 if card.header is not None else 1 :]
    index = pa.array(kept)
    return {name: texts.take(index) for name, texts in trimmed.items()}, row[kept]


def _unparsable(file: str, card: TableCard, told: str) -> DataError:
    """The library's own text would quote the row."""
    if "Empty CSV" in told:
        return DataError(explain(file, expected="rows", found="an empty file", remedy="Export it again."))
    if "UTF8" in told or "codec" in told:
        return _wrong_encoding(file, card)
    return DataError(explain(file, expected="rows of cells", found="a row that never ends", remedy=_QUOTES))


def _refuse_long_cells(table: Table, card: TableCard) -> None:
    """A line break in an identifier, a time or a code is the mark of a quote that was never closed: rows are lost in it."""
    for column in (card.study, card.subject, card.time, card.code):
        if column is None or column not in table.columns:
            continue
        broken = np.flatnonzero(np.asarray(pc.match_substring_regex(table.columns[column], "[\r\n]")))
        if len(broken):
            found = f"a line break in {len(broken)}"
            raise DataError(
                explain(f"{table.where(int(broken[0]))}: {column}", expected="cells of one line", found=found, remedy=_QUOTES)
            )


def _filtered(table: Table, card: TableCard) -> Table:
    keep = np.ones(table.num_rows, bool)
    for column, wanted in card.where.items():
        keep &= mapped(table.columns[column], dict.fromkeys((wanted,) if isinstance(wanted, str) else wanted, 1.0)) == 1.0
    if keep.all():
        return table
    mask = pa.array(keep)
    columns = {name: values.filter(mask) for name, values in table.columns.items()}
    return replace(table, columns=columns, row=table.row[keep], not_wanted=int((~keep).sum()))
