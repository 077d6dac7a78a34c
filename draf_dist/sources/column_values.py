"""Values of many columns at once: a block of columns is one array of text, read, converted and aggregated in one go."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from draf_dist.errors import DataError, explain, together
from draf_dist.sources import tables, units
from draf_dist.sources.card_variables import VariableCard
from draf_dist.sources.find_columns import SHOWN
from draf_dist.sources.study_rows import MatchedRows
from draf_dist.sources.tables import Table

# Cells of a block: memory for a few such arrays beside the text.
BLOCK_CELLS = 2**22


@dataclass(frozen=True)
class ColumnValues:
    """values: float64 (n, F), NaN where not observed. observed, out_of_range: int64 (F,), cells. converted: from another unit."""

    values: NDArray[np.float64]
    observed: NDArray[np.int64]
    out_of_range: NDArray[np.int64]
    converted: bool


def column_values(
    table: Table, rows: MatchedRows, names: tuple[str, ...], rule: VariableCard, conversion: units.Conversion, num_studies: int
) -> ColumnValues:
    """Columns of a wide table for n studies. rule: range, missing and aggregate of all of them.

    Raises:
        DataError: a cell that is no number.
    """
    assert rule.aggregate is not None, "the caller fills in the modality's"
    order, starts = _by_study(rows)
    position, study = pa.array(rows.position[order]), rows.study[order][starts]
    found = ColumnValues(
        np.full((num_studies, len(names)), np.nan),
        np.zeros(len(names), np.int64),
        np.zeros(len(names), np.int64),
        not conversion.is_identity,
    )
    if len(order) == 0:
        return found
    step = max(1, BLOCK_CELLS // len(order))
    for begin in range(0, len(names), step):
        block = slice(begin, min(begin + step, len(names)))
        values = conversion(_numbers(table, position, names[block], rule.missing))
        outside = _outside(values, rule)
        values[outside] = np.nan
        found.out_of_range[block] = outside.sum(axis=1)
        found.observed[block] = (~np.isnan(values)).sum(axis=1)
        found.values[study, block] = _reduced(values, starts, rule.aggregate).T
    return found


def _by_study(rows: MatchedRows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows by study, then time, then place in the file; and where in that order every study begins."""
    order = np.lexsort((np.arange(len(rows.study)), rows.age_us, rows.study))
    return order, np.flatnonzero(np.diff(rows.study[order], prepend=-1))


def _numbers(table: Table, position: pa.Array, names: tuple[str, ...], missing: tuple[float, ...]) -> NDArray[np.float64]:
    """Float64 (columns, rows). One array for all columns: a call for each would cost more than the numbers."""
    taken = pa.RecordBatch.from_arrays([table.columns[name] for name in names], names=list(names)).take(position)
    cells = pa.concat_arrays(taken.columns)
    cells = pc.if_else(pc.is_in(cells, value_set=pa.array(table.missing, pa.string())), pa.scalar(None, pa.string()), cells)
    flat = tables.numbers(cells, decimal=table.decimal)
    values = flat.reshape(len(names), len(position))
    wrong = (np.isnan(flat) & np.asarray(cells.is_valid())).reshape(values.shape)
    if wrong.any():
        raise DataError(_not_numeric(table, position, names, wrong))
    for sentinel in missing:
        values[values == sentinel] = np.nan
    return values


def _not_numeric(table: Table, position: pa.Array, names: tuple[str, ...], wrong: NDArray[np.bool_]) -> str:
    """The first few columns with cells that are no numbers; the cells themselves may be anything, so they are not shown."""
    bad = np.flatnonzero(wrong.any(axis=1))
    remedy = 'If a word there means "not known", add it to `missing` of the table; else leave the column out with `exclude`.'
    problems = []
    for column in bad[:SHOWN]:
        rows = np.asarray(position)[np.flatnonzero(wrong[column])]
        found = f"something else in {len(rows)} cells (the first in row {table.row[rows.min()]})"
        problems.append(explain(f"{table.file}: column {names[column]!r}", expected="numbers", found=found, remedy=remedy))
    more = len(bad) - SHOWN
    return together([*problems, *([f"{table.file}: ... and {more} more columns."] if more > 0 else [])])


def _outside(values: NDArray[np.float64], rule: VariableCard) -> NDArray[np.bool_]:
    if rule.type == "binary":
        return np.asarray(~np.isnan(values) & (values != 0) & (values != 1))
    low, high = rule.range
    return np.asarray((values < (-np.inf if low is None else low)) | (values > (np.inf if high is None else high)))


def _reduced(values: NDArray[np.float64], starts: NDArray[np.int64], how: str) -> NDArray[np.float64]:
    """(columns, studies): last, mean, min or max of what is observed among the rows of every study; NaN where nothing is."""
    if len(starts) == values.shape[1]:
        return values
    known = ~np.isnan(values)
    match how:
        case "last":
            last = np.maximum.reduceat(np.where(known, np.arange(values.shape[1]), -1), starts, axis=1)
            return np.where(last < 0, np.nan, np.take_along_axis(values, np.maximum(last, 0), axis=1))
        case "mean":
            count = np.add.reduceat(known.astype(np.int64), starts, axis=1)
            total = np.add.reduceat(np.where(known, values, 0.0), starts, axis=1)
            return np.where(count == 0, np.nan, total / np.maximum(count, 1))
        case "min":
            return np.asarray(np.fmin.reduceat(values, starts, axis=1))
        case _:
            return np.asarray(np.fmax.reduceat(values, starts, axis=1))
