"""Rows of eICU tables as arrays: numbers in range, series on a grid, codes as 0 and 1."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from draf_dist.sources import tables
from draf_dist.sources.base import VariableCounts
from draf_dist.sources.eicu.card import MINUTES_PER_HOUR, CodeList, Variable
from draf_dist.sources.eicu.files import KnownRows
from draf_dist.sources.records import reduce_sorted


def numbers(text: pa.Array, variable: Variable, tally: VariableCounts) -> NDArray[np.float64]:
    """float64 (m,): the text as numbers; NaN where missing, unreadable or out of range, all counted."""
    values = tables.numbers(text)
    if variable.values:
        named = tables.mapped(text, variable.values)
        values = np.where(np.isnan(named), values, named)
    tally.unreadable += int((np.isnan(values) & np.asarray(text.is_valid())).sum())
    for sentinel in variable.missing:
        values = np.where(values == sentinel, np.nan, values)
    low, high = variable.range
    outside = np.zeros(len(values), bool)
    if variable.type == "binary":
        outside = ~np.isnan(values) & (values != 0) & (values != 1)
    if low is not None:
        outside |= values < low
    if high is not None:
        outside |= values > high
    values = np.where(outside, np.nan, values)
    tally.out_of_range += int(outside.sum())
    tally.observed += int((~np.isnan(values)).sum())
    return values


def one_per_stay(rows: KnownRows, values: NDArray[np.float64], num_stays: int) -> NDArray[np.float64]:
    """(n, 1): the value of each stay, the last of several in the order of the file; NaN without one."""
    return _reduced(rows.stay, rows.offset_min, values, num_stays, "last")[:, None]


def on_grid(
    rows: KnownRows, values: NDArray[np.float64], num_stays: int, step_h: float, num_steps: int, how: str
) -> NDArray[np.float64]:
    """(n, T): values by steps (end - step, end] from admission on; what was charted at the very admission is in the first."""
    step_min = step_h * MINUTES_PER_HOUR
    step = np.clip(np.ceil(rows.offset_min / step_min) - 1, 0, num_steps - 1).astype(np.int64)
    return _reduced(rows.stay * num_steps + step, rows.offset_min, values, num_stays * num_steps, how).reshape(num_stays, num_steps)


def _reduced(
    cell: NDArray[np.int64], when: NDArray[np.float64], values: NDArray[np.float64], num_cells: int, how: str
) -> NDArray[np.float64]:
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.lexsort((known, when[known], cell[known]))]
    return reduce_sorted(cell[order], values[order], num_cells=num_cells, how=how)


def multi_hot(rows: KnownRows, text: pa.Array, codes: CodeList, num_stays: int) -> NDArray[np.float64]:
    """(n, F): 1 where a row of the stay matches, 0 where it has rows that say something and none matches, NaN without such rows.

    text: of every row of the table; null where the cell is empty, which matches nothing but shows that the table is kept.
    """
    encoded = text.take(pa.array(rows.position)).fill_null("").dictionary_encode()
    different = encoded.dictionary.to_pylist()
    index = np.asarray(encoded.indices)
    silent = np.array([_matches(cell, codes.says_nothing) for cell in different], bool)
    hits = np.array([[_matches(cell, patterns) for patterns in codes.patterns()] for cell in different], np.float64)
    result = np.full((num_stays, len(codes.codes)), np.nan)
    says = ~silent[index] if len(different) else np.zeros(0, bool)
    if says.any():
        np.fmax.at(result, rows.stay[says], hits[index[says]])
    return result


def category(text: pa.Array, codes: CodeList) -> NDArray[np.float64]:
    """(n, F): one-hot of one cell a stay; NaN where the cell is empty."""
    everyone = np.flatnonzero(np.asarray(pc.is_valid(text))).astype(np.int64)
    rows = KnownRows(everyone, everyone, np.zeros(len(everyone)))
    return multi_hot(rows, text, codes, len(text))


def _matches(cell: str, patterns: tuple[str, ...]) -> bool:
    return any(_compiled(pattern).fullmatch(cell.casefold()) is not None for pattern in patterns)


def _compiled(pattern: str) -> re.Pattern[str]:
    # re keeps what it has compiled. Brackets and question marks of a pattern are no wildcards here, for the codes contain them.
    return re.compile(".*".join(re.escape(part) for part in pattern.casefold().split("*")), re.DOTALL)
