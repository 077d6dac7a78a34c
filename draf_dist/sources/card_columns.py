"""Many columns of a wide table at once, by pattern or from a list, with one rule for all of them."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import model_validator

from draf_dist.schema.modality import VariableSpec
from draf_dist.sources.card_parts import CardPart
from draf_dist.sources.card_variables import Code, LocalUnit, VariableCard


class ListedColumns(CardPart):
    """Names in a file below the raw folder.

    column: of a CSV file with a line of column names; without it the file has one name a line. Empty cells are skipped, a name that
    stands twice counts once. suffix: what follows every name in the table's columns; of several, all names with the first come
    first.
    """

    path: str
    column: str | None = None
    suffix: Code = ""

    def columns(self, names: Iterable[str]) -> tuple[str, ...]:
        """The columns that the names stand for."""
        suffixes = (self.suffix,) if isinstance(self.suffix, str) else self.suffix
        names = tuple(names)
        return tuple(dict.fromkeys(f"{name}{suffix}" for suffix in suffixes for name in names))


class ColumnsCard(CardPart):
    """Variables from every column of a wide table that a pattern matches or a list names, each called as its column.

    pattern: * stands for anything, ? for one character, [abc] for one of these; of several, one is enough. exclude: patterns of
    columns that are not taken. lacking: what becomes of a column that a site of the modality has not (or, if listed, no site has):
    `error`; `not_observed`, at the sites that lack it; `leave_out`, everywhere. unit, canonical, range, type, missing, aggregate:
    of every column, as of a variable. A cell that is no number, and not among what means "not known", is an error.
    """

    pattern: Code | None = None
    listed: ListedColumns | None = None
    exclude: tuple[str, ...] = ()
    lacking: Literal["error", "not_observed", "leave_out"] = "error"
    unit: LocalUnit | None = None
    canonical: str | None = None
    range: tuple[float | None, float | None] = (None, None)
    type: Literal["numeric", "binary"] = "numeric"
    missing: tuple[float, ...] = ()
    aggregate: Literal["last", "mean", "min", "max"] | None = None

    @model_validator(mode="after")
    def _names_columns_in_one_way(self) -> "ColumnsCard":
        if (self.pattern is None) == (self.listed is None):
            raise ValueError("either `pattern` or `listed` says which columns")
        # What the rule refuses is told here, with the place.
        _ = self.rule
        return self

    @property
    def rule(self) -> VariableCard:
        """What holds for every column, as a variable; its name stands for all of them."""
        return VariableCard(
            name="columns",
            unit=self.unit,
            canonical=self.canonical,
            range=self.range,
            type=self.type,
            missing=self.missing,
            aggregate=self.aggregate,
        )

    def title(self) -> str:
        """Which columns are meant, for messages."""
        if self.listed is not None:
            return f"columns listed in {self.listed.path}" + (f" ({self.listed.column})" if self.listed.column is not None else "")
        return f"columns {self.pattern}" if isinstance(self.pattern, str) else f"columns {', '.join(self.pattern or ())}"

    def chosen(self, columns: Iterable[str], listed: frozenset[str] | None) -> tuple[str, ...]:
        """Those of some columns that are meant, in their order. listed: the columns of the list, where there is one."""
        patterns = (self.pattern,) if isinstance(self.pattern, str) else self.pattern or ()
        return tuple(
            name
            for name in columns
            if (name in listed if listed is not None else _any_matches(patterns, name)) and not _any_matches(self.exclude, name)
        )

    def specs(self, names: Iterable[str]) -> tuple[VariableSpec, ...]:
        """The columns as the release describes them."""
        every = self.rule.spec()
        return tuple(every.model_copy(update={"name": name}) for name in names)


def _any_matches(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
