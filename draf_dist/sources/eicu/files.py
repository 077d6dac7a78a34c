"""The files of an eICU export, and which of their rows were known by the end of a stay's first day."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from draf_dist.errors import DataError, together
from draf_dist.sources import tables
from draf_dist.sources.base import TableCounts
from draf_dist.sources.card_model import TableCard
from draf_dist.sources.tables import Table, TableFile

STAY = "patientunitstayid"


@dataclass(frozen=True)
class Timing:
    """When a row happened and when it was known: columns in minutes from admission to the unit.

    entered: when it was written down, where the table says so; a row counts from the later of the two. ends: where the row lasts.
    whole_past: rows from before the admission count too, as a history does; otherwise what was over by then is left out.
    """

    begins: str
    entered: str | None = None
    ends: str | None = None
    whole_past: bool = False

    def columns(self) -> tuple[str, ...]:
        """The columns that it needs."""
        return tuple(column for column in (self.begins, self.entered, self.ends) if column is not None)


# Everything that is read, and nothing else: no other table of an export is opened. apacheApsVar has no times; it is about day one.
TIMINGS: dict[str, Timing | None] = {
    "apacheApsVar": None,
    "vitalAperiodic": Timing("observationoffset"),
    "respiratoryCharting": Timing("respchartoffset", entered="respchartentryoffset"),
    "medication": Timing("drugstartoffset", entered="drugorderoffset", ends="drugstopoffset"),
    "infusionDrug": Timing("infusionoffset"),
    "pastHistory": Timing("pasthistoryoffset", entered="pasthistoryenteredoffset", whole_past=True),
    "admissionDx": Timing("admitdxenteredoffset", whole_past=True),
}


@dataclass(frozen=True)
class Stays:
    """n stays in the order of the patient table.

    position: int64 (n,), rows of `table`. key: their patientunitstayid. subject, site: as the export has them. label: int64 (n,).
    known_until_min: float64 (n,), the end of the window or of the stay, whichever comes first, in minutes from admission.
    """

    table: Table
    position: NDArray[np.int64]
    key: pa.Array
    subject: tuple[str, ...]
    site: tuple[str, ...]
    label: NDArray[np.int64]
    known_until_min: NDArray[np.float64]

    def __len__(self) -> int:
        """The number of stays, n."""
        return len(self.position)


@dataclass(frozen=True)
class KnownRows:
    """Rows of a table that belong to a stay and were known in time. position, stay: int64 (m,); offset_min: float64 (m,)."""

    position: NDArray[np.int64]
    stay: NDArray[np.int64]
    offset_min: NDArray[np.float64]


def find(raw: Path, name: str, columns: Iterable[str]) -> TableFile:
    """A table's file, `.csv.gz` or `.csv`, seen to have the columns.

    Raises:
        DataError: no such file, or a column that is not there.
    """
    packed = f"{name}.csv.gz"
    file = packed if (raw / packed).exists() or not (raw / f"{name}.csv").exists() else f"{name}.csv"
    return tables.find_table(raw, TableCard(path=file), site="", folder="", columns=columns)


def find_all(raw: Path, columns: dict[str, set[str]]) -> dict[str, TableFile]:
    """All files that are read.

    Raises:
        DataError: what is missing, all files together.
    """
    found, problems = {}, []
    for name, needed in columns.items():
        try:
            found[name] = find(raw, name, needed)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(together(problems))
    return found


def read(found: TableFile, missing: tuple[str, ...]) -> Table:
    """The rows of a file.

    Raises:
        DataError: rows of unequal length, text in another encoding.
    """
    return tables.read_table(found, TableCard(path=found.file, study=STAY), missing=missing)


def known_rows(table: Table, timing: Timing | None, stays: Stays, counts: TableCounts) -> KnownRows:
    """The rows that happened and were written down inside a stay's window: the only way in for whatever has a time.

    A row whose time is missing or unreadable can't be shown to be from before the anchor, so it is left out, and counted.
    """
    stay = np.asarray(pc.index_in(table.text(STAY), value_set=stays.key, skip_nulls=True).fill_null(-1)).astype(np.int64)
    position = np.flatnonzero(stay >= 0).astype(np.int64)
    counts.rows, counts.unmatched = table.num_rows, table.num_rows - len(position)
    if timing is None:
        return KnownRows(position, stay[position], np.zeros(len(position)))
    begins = tables.numbers(table.text(timing.begins))[position]
    known_at = begins if timing.entered is None else np.maximum(begins, tables.numbers(table.text(timing.entered))[position])
    over = begins if timing.ends is None else tables.numbers(table.text(timing.ends))[position]
    has_time = ~np.isnan(known_at)
    inside = has_time & (known_at <= stays.known_until_min[stay[position]])
    if not timing.whole_past:
        inside &= ~(over < 0)
    counts.bad_time, counts.outside_window = int((~has_time).sum()), int((has_time & ~inside).sum())
    return KnownRows(position[inside], stay[position[inside]], begins[inside])
