"""Masks and maps too large to be held at once: counts that are added up over patches, volumes and ranks, in any order."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from draf_dist.metrics.classification import Flags, Floats, Integers

# Of an f32, sign first: those that say in which bin it lies. 8 for the power of two, 7 of what follows.
_DROPPED_BITS = 16
NUM_BINS = 1 << (31 - _DROPPED_BITS)
# Two values in one bin differ by less than this share of the smaller one, from 1.2e-38 on.
BIN_WIDTH = 2.0**-7


@dataclass(frozen=True)
class Overlap:
    """Voxels of every structure: in both masks, in the predicted one, in the true one. int64 (K,)."""

    both: Integers
    predicted: Integers
    true: Integers

    @classmethod
    def of(cls, predicted: Integers, true: Integers, num_structures: int) -> "Overlap":
        """Of two masks of one shape with values in [0, K), or of a part of them."""
        pairs = np.bincount(true.ravel().astype(np.int64) * num_structures + predicted.ravel(), minlength=num_structures**2)
        table = pairs.astype(np.int64).reshape(num_structures, num_structures)
        return cls(np.diagonal(table).copy(), table.sum(axis=0), table.sum(axis=1))

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(self.both + other.both, self.predicted + other.predicted, self.true + other.true)

    @property
    def dice(self) -> Floats:
        """2 I / (P + T) of every structure, in [0, 1]; NaN for one that is in neither mask. (K,).

        Of one volume, if its parts alone were added up; of the sum over volumes, it is that of all voxels together, in which
        large volumes count more.
        """
        size = self.predicted + self.true
        return np.asarray(np.where(size > 0, 2 * self.both / np.maximum(size, 1), np.nan), dtype=np.float64)


@dataclass(frozen=True)
class ErrorDetection:
    """How well an uncertainty finds the errors: voxels by their uncertainty, right and wrong ones. int64 (NUM_BINS,) each.

    Bins are those of equal sign, exponent and first 7 bits of the f32, so they need no range and are as fine near 0, where most
    voxels lie, as anywhere: two values in one bin differ by less than 1 in 128.
    """

    right: Integers
    wrong: Integers

    @classmethod
    def of(cls, uncertainty: NDArray[np.floating], error: Flags) -> "ErrorDetection":
        """Of a map and a mask of one shape, or of a part of them. What lies below 0 by rounding counts as 0.

        Raises:
            ValueError: a value is NaN.
        """
        # + 0.0 makes -0 a 0.
        values = np.maximum(uncertainty.ravel(), 0).astype(np.float32) + np.float32(0)
        if np.isnan(values).any():
            raise ValueError("an uncertainty map holds NaN")
        place = values.view(np.uint32) >> _DROPPED_BITS
        flags = error.ravel()
        return cls(*(np.bincount(place[chosen], minlength=NUM_BINS).astype(np.int64) for chosen in (~flags, flags)))

    def __add__(self, other: "ErrorDetection") -> "ErrorDetection":
        return ErrorDetection(self.right + other.right, self.wrong + other.wrong)

    @property
    def auroc(self) -> float:
        """The chance that a wrong voxel is more uncertain than a right one, a shared bin counting one half; NaN without both.

        That of the values themselves is at most `resolution` away.
        """
        below = np.cumsum(self.right) - self.right
        return self._share(np.sum(self.wrong * (below + self.right / 2.0)))

    @property
    def resolution(self) -> float:
        """Half the share of pairs of a wrong and a right voxel that lie in one bin; NaN without both."""
        return self._share(np.sum(self.wrong * (self.right / 2.0)))

    @property
    def num_voxels(self) -> int:
        """How many were counted."""
        return int(self.right.sum() + self.wrong.sum())

    def risk(self, coverage: float) -> float:
        """The share of wrong ones among the most certain voxels, `coverage` in (0, 1] of all; NaN without voxels.

        Within a bin any order is as good as another: errors are spread evenly over it, as metrics/selective.py does with ties.
        """
        kept = coverage * self.num_voxels
        voxels, wrong = (np.concatenate([[0], np.cumsum(counts)]) for counts in (self.right + self.wrong, self.wrong))
        return float(np.interp(kept, voxels, wrong)) / kept if kept else float("nan")

    def _share(self, pairs: np.float64) -> float:
        of = float(self.right.sum()) * float(self.wrong.sum())
        return float(pairs) / of if of else float("nan")
