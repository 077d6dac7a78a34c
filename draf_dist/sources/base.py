"""What every source offers to `draf prepare`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from draf_dist.schema.modality import DataSchema
from draf_dist.schema.study import Rejection, Study


@dataclass
class VariableCounts:
    """What became of the values of one variable that lay inside the window.

    observed: values kept. converted: of these, how many came in another unit than the canonical one. out_of_range: implausible,
    left out. unreadable: no number (`<0.5`, `haemolysed`), left out. empty_at: sites that should record the variable, by the card,
    and of which no value could be read.
    """

    observed: int = 0
    converted: int = 0
    out_of_range: int = 0
    unreadable: int = 0
    empty_at: list[str] = field(default_factory=list)


@dataclass
class TableCounts:
    """What became of the rows of one table.

    rows: read. not_wanted: left out by the card's `where`, and not among those read. unmatched: of no study. bad_time: time
    missing or unreadable, left out. outside_window: too early or too late.
    """

    rows: int = 0
    not_wanted: int = 0
    unmatched: int = 0
    bad_time: int = 0
    outside_window: int = 0


@dataclass
class SourceCounts:
    """Tallies of one pass: variables by `modality.variable`, tables by `modality.table`. Complete once the pass has ended.

    columns_left_out: by what names them in the card, how many columns it means and does not take, for not every site has them.
    """

    variables: dict[str, VariableCounts] = field(default_factory=dict)
    tables: dict[str, TableCounts] = field(default_factory=dict)
    columns_left_out: dict[str, int] = field(default_factory=dict)


class Described(Protocol):
    """What the card says of a data set as a whole.

    held_out_sites: their subjects go to the split `ood`. public_subject_key: true only for data without real people.
    """

    name: str
    schema: DataSchema
    held_out_sites: frozenset[str]
    public_subject_key: bool
    card_sha256: str


class Source(Described, Protocol):
    """A raw export that can be read as studies. counts: of the latest pass over studies()."""

    counts: SourceCounts

    def studies(self) -> Iterator[Study | Rejection]:
        """Every study once, in an order that depends on the export alone; what can't be used comes as a Rejection.

        Raises:
            DataError: the export as a whole does not fit the card (a missing file or column, an unknown unit, one image file
                claimed by two subjects).
        """
        ...
