"""Uniform, normal and Bernoulli numbers as a pure function of (key, element) (docs/noise.md, 3).

A 64-bit hash is cut into lanes: four of 16 bits for masks and normal numbers, two of 32 bits for uniform ones. Element i of a
row lies in lane i % lanes of hash i // lanes of that row's key, so it depends on nothing but (key, i): not on the batch, the
shape of the rest, the size of the blocks, the device or the number of threads.
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draf_dist.errors import DataError, explain
from draf_dist.noise.blocks import FillNp, FillTorch, fill_np, fill_torch
from draf_dist.noise.compiled import opaque
from draf_dist.noise.hashing import chain

TABLE = Path(__file__).with_name("normal_quantiles.npy")
TABLE_SHA256 = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"


@dataclass(frozen=True)
class Draw:
    """How hash bits become numbers: with numpy on the CPU, with torch elsewhere, the same bits either way.

    numpy, because most draws are small and its calls cost half of torch's, and because uint64 needs no masks.
    """

    salt: int
    lanes: int
    dtype: torch.dtype
    dtype_np: type[np.generic]
    fill_np: FillNp
    fill_torch: FillTorch

    def __call__(self, keys: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The numbers for int64 keys, one row per key: (*keys.shape, *shape)."""
        if keys.dtype is not torch.int64:
            raise TypeError(f"keys are int64, found {keys.dtype}")
        if not keys.is_cpu:
            return self.with_torch(keys, shape)
        start = keys.numpy().view(np.uint64).reshape(-1, 1)
        rows = np.empty((start.shape[0], math.prod(shape)), self.dtype_np)
        if rows.size:
            fill_np(start, rows, self.lanes, self.salt, self.fill_np)
        return torch.from_numpy(rows.reshape(*keys.shape, *shape))

    def with_torch(self, keys: Tensor, shape: tuple[int, ...]) -> Tensor:
        """For keys on any device, with torch operations alone."""
        rows = torch.empty((keys.numel(), math.prod(shape)), dtype=self.dtype, device=keys.device)
        if rows.numel():
            fill_torch(keys.reshape(-1, 1), rows, self.lanes, self.salt, self.fill_torch)
        return rows.view(*keys.shape, *shape)


def uniform(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Numbers k / 2**24 with k uniform in 0 .. 2**24 - 1: f32 (*keys.shape, *shape) from int64 keys, one row per key."""
    return _uniform_opaque(keys, shape, 0.0) if torch.compiler.is_compiling() else _UNIFORM(keys, shape)


def normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, one of 65,536 quantiles by 16 hash bits: f32 (*keys.shape, *shape), at most 4.33 in size."""
    return _normal_opaque(keys, shape, 0.0) if torch.compiler.is_compiling() else _NORMAL(keys, shape)


def bernoulli(keys: Tensor, shape: tuple[int, ...], probability: float) -> Tensor:
    """True with the given probability, rounded to a multiple of 2**-16: bool (*keys.shape, *shape).

    0 and 1 are exact; any other probability is off by at most 2**-17 (8e-6). Masks of one key are nested: what is True at one
    probability is True at every larger one.
    """
    if torch.compiler.is_compiling():
        return _bernoulli_opaque(keys, shape, probability)
    return _mask(lanes_below(probability))(keys, shape)


def lanes_below(probability: float) -> int:
    """How many of the 65,536 values of a lane stand for True. Raises ValueError for what is no probability."""
    if not 0 <= probability <= 1:
        raise ValueError(f"a probability lies in [0, 1], found {probability}")
    return math.floor(probability * 65536 + 0.5)


@functools.lru_cache(maxsize=8)
def normal_quantiles(device: torch.device) -> Tensor:
    """The pinned table: f32 (65536,), ascending; docs/noise.md says how it was made. Raises DataError if it was altered."""
    table = np.load(TABLE, allow_pickle=False)
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    if digest != TABLE_SHA256:
        raise DataError(explain(TABLE.name, expected=f"sha256 {TABLE_SHA256}", found=digest, remedy="Install draf_dist again."))
    # Kept for ever, so it must not be an inference tensor when the first draw happens in inference mode.
    with torch.inference_mode(mode=False):
        return torch.from_numpy(table).to(device)


@functools.lru_cache(maxsize=1)
def _quantiles_np() -> NDArray[np.float32]:
    table: NDArray[np.float32] = normal_quantiles(torch.device("cpu")).numpy()
    return table


def _salt(kind: str) -> int:
    # Draws of different kinds with one key must not share bits.
    return chain("draf_dist.noise", kind)


_EIGHT = np.array(8, np.uint32)
_STEP = np.array(2.0**-24, np.float32)


def _uniform_np(hashes: NDArray[np.uint64], out: NDArray[np.generic]) -> None:
    lanes = hashes.view(np.uint32)[:, : out.shape[1]]
    np.right_shift(lanes, _EIGHT, lanes)
    np.copyto(out, lanes.view(np.int32), casting="unsafe")  # exact: 24 bits
    np.multiply(out, _STEP, out)


def _uniform_torch(hashes: Tensor, out: Tensor) -> None:
    lanes = hashes.view(torch.int32)[:, : out.shape[1]]
    torch.mul(lanes.bitwise_right_shift(8).bitwise_and_(0xFFFFFF), 2.0**-24, out=out)


def _normal_np(hashes: NDArray[np.uint64], out: NDArray[np.generic]) -> None:
    # "clip" is the mode that neither checks nor copies; 16 bits can't leave the table.
    _quantiles_np().take(hashes.view(np.uint16)[:, : out.shape[1]], None, out, "clip")


def _normal_torch(hashes: Tensor, out: Tensor) -> None:
    index = hashes.view(torch.uint16)[:, : out.shape[1]].to(torch.int32)
    torch.index_select(normal_quantiles(out.device), 0, index.view(-1), out=out.view(-1))


_UNIFORM = Draw(_salt("uniform"), 2, torch.float32, np.float32, _uniform_np, _uniform_torch)
_NORMAL = Draw(_salt("normal"), 4, torch.float32, np.float32, _normal_np, _normal_torch)
_SALT_BERNOULLI = _salt("bernoulli")


@functools.lru_cache(maxsize=256)
def _mask(count: int) -> Draw:
    """True for a lane, read as unsigned, below count (0 .. 65536)."""
    if count == 65536:
        return Draw(_SALT_BERNOULLI, 4, torch.bool, np.bool_, lambda _, out: out.fill(True), lambda _, out: out.fill_(True))
    bound = np.array(count, np.uint16)

    def less_np(hashes: NDArray[np.uint64], out: NDArray[np.generic]) -> None:
        np.less(hashes.view(np.uint16)[:, : out.shape[1]], bound, out)

    def less_torch(hashes: Tensor, out: Tensor) -> None:
        lanes = hashes.view(torch.uint16)[:, : out.shape[1]]
        torch.lt(lanes.to(torch.int32), count, out=out)

    return Draw(_SALT_BERNOULLI, 4, torch.bool, np.bool_, less_np, less_torch)


_uniform_opaque = opaque("uniform", lambda keys, shape, _: uniform(keys, shape), torch.float32)
_normal_opaque = opaque("normal", lambda keys, shape, _: normal(keys, shape), torch.float32)
_bernoulli_opaque = opaque("bernoulli", bernoulli, torch.bool)
