"""Random numbers of the synthetic hospitals: pure functions of (seed, name, subject, visit)."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from draf_dist import noise


@dataclass(frozen=True)
class Draws:
    """Numbers for n studies. A study's numbers do not depend on which other studies are asked for.

    subject, visit: int64 (n,). So the first 400 subjects of a cohort of 6,400 are the cohort of 400.
    """

    seed: int
    subject: NDArray[np.int64]
    visit: NDArray[np.int64]

    def rows(self, index: NDArray[np.int64]) -> "Draws":
        """The draws of some of the studies."""
        return Draws(self.seed, self.subject[index], self.visit[index])

    def uniform(self, name: str, *shape: int) -> NDArray[np.float64]:
        """Uniform in [0, 1), (n, *shape)."""
        return np.asarray(noise.uniform(self._keys(name), shape).double().numpy())

    def normal(self, name: str, *shape: int) -> NDArray[np.float64]:
        """Standard normal, (n, *shape)."""
        return np.asarray(noise.normal(self._keys(name), shape).double().numpy())

    def integers(self, name: str, low: int, high: int, *shape: int) -> NDArray[np.int64]:
        """Uniform integers in [low, high), (n, *shape)."""
        drawn = low + np.floor(self.uniform(name, *shape) * (high - low))
        return np.asarray(drawn.astype(np.int64))

    def _keys(self, name: str) -> torch.Tensor:
        keys = noise.chain(self.seed, "synth", name, torch.from_numpy(self.visit), torch.from_numpy(self.subject))
        assert isinstance(keys, torch.Tensor)
        return keys
