"""The hashes of many rows, in blocks that stay in the cache: once in numpy for the CPU, once in torch for other devices."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draf_dist.noise.hashing import GAMMA, MASK64, mix_, mix_np_, signed

# Hashes of one block. On the CPU state, scratch, what is made of them and the quantile table stay in a core's L2 cache; a GPU
# wants few large kernels. The numbers do not depend on it.
BLOCK_CPU = 1 << 14
BLOCK_GPU = 1 << 20

# Fills out (rows, elements) from hashes (rows, hashes), which it may overwrite. The last hash of a row may have lanes to spare.
FillNp = Callable[[NDArray[np.uint64], NDArray[np.generic]], object]
FillTorch = Callable[[Tensor, Tensor], object]


def fill_np(start: NDArray[np.uint64], out: NDArray[np.generic], lanes: int, salt: int, fill: FillNp) -> None:
    """Fill out (rows, elements) from hash64(start + salt, j), j = element // lanes; start: (rows, 1).

    `fill` gets parts of out that are contiguous in memory.
    """
    per_row = -(-out.shape[1] // lanes)
    steps = _steps_np(salt)
    if start.shape[0] * per_row <= BLOCK_CPU:
        # Small draws are most draws, and their cost is the number of calls.
        state = start + steps[:per_row]
        fill(mix_np_(state, np.empty(state.shape, np.uint64)), out)
        return
    width = min(per_row, BLOCK_CPU)
    state, scratch = np.empty((2, BLOCK_CPU // width, width), np.uint64)
    for row, num_rows, first, num in _cut(start.shape[0], per_row, BLOCK_CPU):
        part = out[row : row + num_rows, first * lanes : (first + num) * lanes]
        here = state[:num_rows, :num]
        np.add(start[row : row + num_rows] + np.uint64(first * GAMMA & MASK64), steps[:num], here)
        fill(mix_np_(here, scratch[:num_rows, :num]), part)


def fill_torch(start: Tensor, out: Tensor, lanes: int, salt: int, fill: FillTorch) -> None:
    """What fill_np does, with torch operations alone, on any device; start: int64 (rows, 1)."""
    per_row = -(-out.shape[1] // lanes)
    width = min(per_row, BLOCK_GPU)
    steps = torch.arange(1, width + 1, dtype=torch.int64, device=start.device).mul_(signed(GAMMA)).add_(salt)
    for row, num_rows, first, num in _cut(start.shape[0], per_row, BLOCK_GPU):
        part = out[row : row + num_rows, first * lanes : (first + num) * lanes]
        state = start[row : row + num_rows] + signed(first * GAMMA) + steps[:num]
        fill(mix_(state, torch.empty_like(state)), part)


def _cut(num_rows: int, per_row: int, block: int) -> Iterator[tuple[int, int, int, int]]:
    """Blocks of whole rows, or of parts of one row, as (row, rows, first hash, hashes)."""
    width = min(per_row, block)
    rows = block // width
    for row in range(0, num_rows, rows):
        for first in range(0, per_row, width):
            yield row, min(rows, num_rows - row), first, min(width, per_row - first)


@functools.lru_cache(maxsize=8)
def _steps_np(salt: int) -> NDArray[np.uint64]:
    """What is added to a key for each of the first hashes of a block: uint64 (BLOCK_CPU,)."""
    return np.arange(1, BLOCK_CPU + 1, dtype=np.uint64) * np.uint64(GAMMA) + np.uint64(salt & MASK64)
