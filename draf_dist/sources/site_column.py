"""Which rows of the studies table are a site's, where the site is a value in a column."""

import re

import numpy as np
from numpy.typing import NDArray

from draf_dist.schema.study import Rejection
from draf_dist.sources.card_model import SiteColumn
from draf_dist.sources.tables import Table, lookup


def site_index(sites: SiteColumn, table: Table) -> NDArray[np.int64]:
    """int64 (rows,): the index of each row's site; that of `other`, or -1 without one, where no group lists the value."""
    groups = list(sites.groups.values())
    by_value = {_plain(value): i for i, values in enumerate(groups) for value in ((values,) if isinstance(values, str) else values)}
    rest = len(groups) if sites.other is not None else -1
    pattern = re.compile(sites.pattern) if sites.pattern is not None else None

    def index(text: str) -> float:
        found = pattern.search(text) if pattern is not None else None
        value = text if pattern is None else (found.group(1) or "") if found else ""
        return by_value.get(_plain(value), rest)

    values = lookup(table.text(sites.column), index)
    return np.where(np.isnan(values), rest, values).astype(np.int64)


def unknown_sites(table: Table, index: NDArray[np.int64]) -> list[Rejection]:
    """A rejection for every row whose site is not listed."""
    detail = "the site is missing or in none of the card's groups"
    return [Rejection("", table.where(int(row)), "unknown site", detail) for row in np.flatnonzero(index < 0)]


def _plain(value: str) -> str:
    return value.strip().casefold()
