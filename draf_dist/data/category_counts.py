"""How often each category occurs in training: what a code that is lost at random is drawn from again."""

import numpy as np
from numpy.typing import NDArray

from draf_dist.schema.modality import SeriesSpec, TableSpec


class CategoryCounts:
    """Counts of the codes of one modality, whole numbers: the order of the samples does not matter."""

    def __init__(self, spec: SeriesSpec | TableSpec, start: tuple[tuple[int, ...], ...] = ()) -> None:
        """start: the counts of samples that came before, as `sums` gives them."""
        self._counts = {at: np.zeros(len(one.categories), np.int64) for at, one in enumerate(spec.variables) if one.categories}
        for counts, before in zip(self._counts.values(), start, strict=False):
            counts += before

    def add(self, values: NDArray[np.float32]) -> None:
        """Counts the observed codes of one sample, (T, F) with NaN where not observed."""
        for at, counts in self._counts.items():
            codes = values[:, at]
            counts += np.bincount(codes[~np.isnan(codes)].astype(np.int64), minlength=len(counts))

    def sums(self) -> tuple[tuple[int, ...], ...]:
        """To go on from later: by categorical variable, in their order."""
        return tuple(tuple(counts.tolist()) for counts in self._counts.values())

    def by_column(self) -> dict[int, tuple[int, ...]]:
        """Place of a categorical variable among all -> its counts."""
        return dict(zip(self._counts, self.sums(), strict=True))
