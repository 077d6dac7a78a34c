"""Series and tables of one site: raw values to canonical units, implausible ones out, the rest on a grid or aggregated."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from draf_dist.errors import DataError, explain, together
from draf_dist.sources import tables, units
from draf_dist.sources.base import VariableCounts
from draf_dist.sources.card_checks import conversion_remedy
from draf_dist.sources.card_model import Card, MultiHot, SeriesCard, TableModalityCard, VariableCard, codes_at
from draf_dist.sources.column_values import column_values
from draf_dist.sources.find_columns import TakenColumns
from draf_dist.sources.study_rows import MatchedRows
from draf_dist.sources.tables import MICROSECONDS_PER_HOUR, Table


@dataclass(frozen=True)
class Extract:
    """One modality's share of one site: its table and which rows of it belong to which study. wide: its many columns at once."""

    card: Card
    site: str
    modality: SeriesCard | TableModalityCard
    table: Table
    rows: MatchedRows
    num_studies: int
    wide: tuple[TakenColumns, ...] = ()


def record_columns(
    card: Card, modality: SeriesCard | TableModalityCard, site: str, wide: tuple[TakenColumns, ...] = ()
) -> set[str]:
    """Columns that a modality needs at a site. wide: those that it takes many at once."""
    table = card.tables[modality.table]
    named = {name for name in (table.study or table.subject, table.time, table.code, table.value, table.unit) if name is not None}
    if table.code is None:
        named |= {column for variable in modality.variables for column in variable.codes_at(site)}
    named |= {column for taken in wide for column in taken.at.get(site, ())}
    hots = modality.multi_hot if isinstance(modality, TableModalityCard) else ()
    return named | {hot.column for hot in hots if any(codes_at(code, site) for code in hot.codes.values())}


def is_recorded(modality: SeriesCard | TableModalityCard, site: str, wide: tuple[TakenColumns, ...] = ()) -> bool:
    """Whether a site records anything of a modality: if not, its table is not even looked for."""
    hots = modality.multi_hot if isinstance(modality, TableModalityCard) else ()
    codes = [variable.codes_at(site) for variable in modality.variables]
    codes += [codes_at(code, site) for hot in hots for code in hot.codes.values()]
    return site not in modality.absent_at and (any(codes) or any(taken.at.get(site) for taken in wide))


def extract(parts: Extract, counts: dict[str, VariableCounts]) -> NDArray[np.float32]:
    """float32 (n, T, F) of all studies of the site, NaN where not observed; T = 1 for a table.

    Raises:
        DataError: units in the data that are not known or don't convert, all of the table together.
    """
    modality = parts.modality
    columns, problems = [], []
    for variable in modality.variables:
        tally = counts.setdefault(f"{modality.name}.{variable.name}", VariableCounts())
        taken, text, unit = _raw_values(parts, variable)
        coded = variable.type == "categorical"
        scaled = _codes(parts, variable, taken, text) if coded else _in_canonical_units(parts, variable, text, unit)
        problems += scaled.problems
        values = _plausible(scaled, variable, tally)
        if variable.codes_at(parts.site) and parts.num_studies and np.isnan(values).all():
            tally.empty_at.append(parts.site)
        how = "last" if variable.type == "categorical" else variable.aggregate or modality.aggregate
        columns.append(_aggregated(parts, taken, values, how)[:, :, None])
    if problems:
        raise DataError(together(problems))
    columns += [_many_columns(parts, taken, counts)[:, None, :] for taken in parts.wide]
    if isinstance(modality, TableModalityCard):
        columns += [_multi_hot(parts, hot, counts)[:, None, :] for hot in modality.multi_hot]
    # What float32 can't hold becomes infinite, which the release counts as out of range.
    with np.errstate(over="ignore"):
        return np.concatenate(columns, axis=2).astype(np.float32)


@dataclass(frozen=True)
class _Scaled:
    """values: float64 (m,), canonical, NaN where missing or unreadable. converted, unreadable: bool (m,). problems: with units."""

    values: NDArray[np.float64]
    converted: NDArray[np.bool_]
    unreadable: NDArray[np.bool_]
    problems: list[str]


def _raw_values(parts: Extract, variable: VariableCard) -> tuple[MatchedRows, pa.Array, pa.Array | None]:
    """The rows that carry a variable, their text, and their unit where the table has a column of units."""
    table_card = parts.card.tables[parts.modality.table]
    codes = variable.codes_at(parts.site)
    position = pa.array(parts.rows.position)
    if table_card.code is None:
        texts = [parts.table.text(column).take(position) for column in codes]
        # Several columns for one variable: the first that says something counts.
        text = pc.coalesce(*texts) if texts else pa.nulls(len(position), pa.string())
        return parts.rows, text, None
    assert table_card.value is not None, "the model sees to it"
    mask = pc.is_in(parts.table.columns[table_card.code], value_set=pa.array(codes, pa.string())).take(position)
    taken = parts.rows.select(np.asarray(mask))
    rows = pa.array(taken.position)
    unit = None if table_card.unit is None else parts.table.text(table_card.unit).take(rows)
    return taken, parts.table.text(table_card.value).take(rows), unit


def _codes(parts: Extract, variable: VariableCard, rows: MatchedRows, text: pa.Array) -> _Scaled:
    """Words as the codes of their categories."""
    values = tables.mapped(text, {word: float(code) for word, code in variable.words_at(parts.site)})
    unknown = np.isnan(values) & np.asarray(text.is_valid())
    problems = []
    if variable.strict and unknown.any():
        # The words themselves may be anything, a name among them, so they are not shown.
        first = parts.table.row[rows.position[unknown].min()]
        problems.append(
            explain(
                f"{parts.table.file}: variable {variable.name}",
                expected=f"one of the categories {', '.join(variable.category_names)}",
                found=f"another word in {int(unknown.sum())} rows (the first is row {first})",
                remedy="Add it to `categories`, or to `missing` of the table; without `strict` it is not observed.",
            )
        )
    return _Scaled(values, np.zeros(len(values), bool), unknown, problems)


def _in_canonical_units(parts: Extract, variable: VariableCard, text: pa.Array, unit: pa.Array | None) -> _Scaled:
    values = tables.numbers(text, decimal=parts.table.decimal)
    if variable.values:
        named = tables.mapped(text, variable.values)
        values = np.where(np.isnan(named), values, named)
    unreadable = np.isnan(values) & np.asarray(text.is_valid())
    for sentinel in variable.missing:
        values = np.where(values == sentinel, np.nan, values)
    stated = variable.unit_at(parts.site)
    if unit is None:
        conversion = _conversion(parts.card, variable, variable.canonical_unit if stated is None else stated)
        return _Scaled(conversion(values), np.full(len(values), not conversion.is_identity), unreadable, [])
    return _by_unit_column(parts, variable, values, unreadable, unit if stated is None else unit.fill_null(stated))


def _by_unit_column(
    parts: Extract, variable: VariableCard, values: NDArray[np.float64], unreadable: NDArray[np.bool_], unit: pa.Array
) -> _Scaled:
    """Values of a long table whose rows say their units; rows without a value need none."""
    encoded = unit.fill_null("").dictionary_encode()
    index, names = np.asarray(encoded.indices), encoded.dictionary.to_pylist()
    scaled, converted, problems = values.copy(), np.zeros(len(values), bool), []
    for i, name in enumerate(names):
        here = (index == i) & ~np.isnan(values)
        if not here.any():
            continue
        try:
            conversion = _conversion(parts.card, variable, name)
        except units.UnitError:
            problems.append(_unit_problem(parts, variable, name, int(here.sum())))
            continue
        scaled[here] = conversion(values[here])
        converted[here] = not conversion.is_identity
    return _Scaled(scaled, converted, unreadable, problems)


def _conversion(card: Card, variable: VariableCard, unit: str) -> units.Conversion:
    known = card.unit_aliases.get(unit, unit)
    return units.conversion(known, variable.canonical_unit, variable.molar_mass_g_mol, variable.valence)


def _unit_problem(parts: Extract, variable: VariableCard, unit: str, num_rows: int) -> str:
    codes = ", ".join(variable.codes_at(parts.site))
    canonical = variable.canonical_unit or "a plain number"
    remedy = conversion_remedy(unit, variable) if unit else f"Give variable {variable.name} a `unit` for rows that state none."
    found = f"{unit!r} in {num_rows} rows" if unit else f"no unit in {num_rows} rows"
    place = f"{parts.table.file}: code {codes} (variable {variable.name})"
    return explain(place, expected=f"a unit convertible to {canonical}", found=found, remedy=remedy)


def _plausible(scaled: _Scaled, variable: VariableCard, tally: VariableCounts) -> NDArray[np.float64]:
    """Values inside the range, NaN elsewhere; counted."""
    low, high = (0.0, 1.0) if variable.type == "binary" else variable.range
    values = scaled.values
    outside = np.zeros(len(values), bool)
    if variable.type == "binary":
        outside = ~np.isnan(values) & (values != 0) & (values != 1)
    if low is not None:
        outside |= values < low
    if high is not None:
        outside |= values > high
    kept = np.where(outside, np.nan, values)
    observed = ~np.isnan(kept)
    tally.observed += int(observed.sum())
    tally.converted += int((observed & scaled.converted).sum())
    tally.out_of_range += int(outside.sum())
    tally.unreadable += int(scaled.unreadable.sum())
    return kept


def _aggregated(parts: Extract, rows: MatchedRows, values: NDArray[np.float64], how: str) -> NDArray[np.float64]:
    """(n, T): values of every study and step as one; NaN where there is none.

    A series has steps (end - step, end], the last ends at the anchor; the start of the window belongs to the first step.
    """
    modality = parts.modality
    num_steps, cell = 1, rows.study
    if isinstance(modality, SeriesCard):
        num_steps = modality.num_steps
        step_us = round(modality.step_h * MICROSECONDS_PER_HOUR)
        from_start = rows.age_us + num_steps * step_us
        cell = rows.study * num_steps + np.clip(-(-from_start // step_us) - 1, 0, num_steps - 1)
    known = np.flatnonzero(~np.isnan(values))
    # By cell, then time, then place in the file: what `last` means never depends on the order of rows with other times.
    order = known[np.lexsort((known, rows.age_us[known], cell[known]))]
    result = reduce_sorted(cell[order], values[order], num_cells=parts.num_studies * num_steps, how=how)
    return result.reshape(parts.num_studies, num_steps)


def reduce_sorted(cell: NDArray[np.int64], values: NDArray[np.float64], *, num_cells: int, how: str) -> NDArray[np.float64]:
    """(num_cells,): last, mean, min or max of the values of every cell; cells come sorted; NaN for an empty one."""
    result = np.full(num_cells, np.nan)
    if len(cell) == 0:
        return result
    starts = np.flatnonzero(np.diff(cell, prepend=-1))
    ends = np.append(starts[1:], len(cell))
    match how:
        case "last":
            reduced: Any = values[ends - 1]
        case "mean":
            reduced = np.add.reduceat(values, starts) / (ends - starts)
        case "min":
            reduced = np.minimum.reduceat(values, starts)
        case _:
            reduced = np.maximum.reduceat(values, starts)
    result[cell[starts]] = reduced
    return result


def _many_columns(parts: Extract, taken: TakenColumns, counts: dict[str, VariableCounts]) -> NDArray[np.float64]:
    """(n, F): columns that a pattern or a list names, NaN throughout where this site has none of that name."""
    here = np.flatnonzero([name in taken.at.get(parts.site, ()) for name in taken.names])
    names = tuple(taken.names[i] for i in here)
    rule = taken.card.rule
    rule = rule.model_copy(update={"aggregate": rule.aggregate or parts.modality.aggregate})
    stated = rule.unit_at(parts.site)
    conversion = _conversion(parts.card, rule, rule.canonical_unit if stated is None else stated)
    found = column_values(parts.table, parts.rows, names, rule, conversion, parts.num_studies)
    for name, observed, outside in zip(names, found.observed.tolist(), found.out_of_range.tolist(), strict=True):
        tally = counts.setdefault(f"{parts.modality.name}.{name}", VariableCounts())
        tally.observed += observed
        tally.converted += observed if found.converted else 0
        tally.out_of_range += outside
        if parts.num_studies and not observed:
            tally.empty_at.append(parts.site)
    result = np.full((parts.num_studies, len(taken.names)), np.nan)
    result[:, here] = found.values
    return result


def _multi_hot(parts: Extract, hot: MultiHot, counts: dict[str, VariableCounts]) -> NDArray[np.float64]:
    """(n, H): 1 where any row of the study lists a code of the variable, 0 where rows list others or none, NaN where not known."""
    codes = [codes_at(code, parts.site) for code in hot.codes.values()]
    result = np.full((parts.num_studies, len(codes)), np.nan)
    if not any(codes):
        return result
    unknown = [text for text in parts.table.missing if text]
    encoded = parts.table.columns[hot.column].take(pa.array(parts.rows.position)).dictionary_encode()
    listed = np.array([_listed(text, hot.separator, codes, unknown) for text in encoded.dictionary.to_pylist()]).reshape(
        -1, len(codes)
    )
    cells = listed[np.asarray(encoded.indices)]
    # fmax skips NaN: one row that lists a code decides, one that says "not known" takes nothing away.
    np.fmax.at(result, parts.rows.study, cells)
    for name, column in zip(hot.codes, result.T, strict=True):
        counts.setdefault(f"{parts.modality.name}.{hot.prefix}{name}", VariableCounts()).observed += int((~np.isnan(column)).sum())
    return result


def _listed(text: str, separator: str | None, codes: list[tuple[str, ...]], unknown: list[str]) -> list[float]:
    """One cell as 0 and 1 per variable; NaN where the cell says "not known" or the site does not record the variable."""
    if text in unknown:
        return [np.nan] * len(codes)
    items = [item.strip() for item in (text.split(separator) if separator else [text])]
    return [float(any(_matches(item, code) for item in items for code in wanted)) if wanted else np.nan for wanted in codes]


def _matches(item: str, code: str) -> bool:
    return item.startswith(code[:-1]) if code.endswith("*") else item == code
