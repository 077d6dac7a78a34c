"""Keys and hash bits: splitmix64 as a pure function of integers, in torch, numpy and Python alike (docs/noise.md, 1-2).

torch has no addition or shift for uint64, so everything is int64, which wraps exactly; an arithmetic right shift drags the sign
in, so each one is masked.
"""

import functools
import hashlib
import operator
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MASK64 = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
# splitmix64 (Steele, Lea, Flood 2014; constants of Stafford's mix 13): x ^= x >>> shift; x *= factor.
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31


def signed(value: int) -> int:
    """The int64 with the same low 64 bits as value."""
    value &= MASK64
    return value - (1 << 64) if value >> 63 else value


def _constant(value: int) -> Tensor:
    # A 0-dim tensor costs a third of what wrapping a Python scalar costs, and may meet tensors of any device.
    return torch.tensor(signed(value), dtype=torch.int64, device="cpu")


_ROUNDS_TORCH = tuple((_constant(shift), _constant(MASK64 >> shift), _constant(factor)) for shift, factor in ROUNDS)
_LAST_TORCH = (_constant(LAST_SHIFT), _constant(MASK64 >> LAST_SHIFT))
_ROUNDS_NP = tuple((np.array(shift, np.uint64), np.array(factor, np.uint64)) for shift, factor in ROUNDS)
_LAST_NP = np.array(LAST_SHIFT, np.uint64)


def mix_(state: Tensor, scratch: Tensor) -> Tensor:
    """The finaliser of splitmix64, in place on int64 state; scratch is of the same shape and is overwritten."""
    for shift, mask, factor in _ROUNDS_TORCH:
        torch.bitwise_right_shift(state, shift, out=scratch)
        state.bitwise_xor_(scratch.bitwise_and_(mask)).mul_(factor)
    shift, mask = _LAST_TORCH
    torch.bitwise_right_shift(state, shift, out=scratch)
    return state.bitwise_xor_(scratch.bitwise_and_(mask))


def mix_np_(state: NDArray[np.uint64], scratch: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What mix_ does, in numpy, on uint64: a logical shift needs no mask."""
    for shift, factor in _ROUNDS_NP:
        np.right_shift(state, shift, scratch)
        np.bitwise_xor(state, scratch, state)
        np.multiply(state, factor, state)
    np.right_shift(state, _LAST_NP, scratch)
    return np.bitwise_xor(state, scratch, state)


def hash64(key: int | Tensor, index: Tensor) -> Tensor:
    """The output of splitmix64 number `index`, counted from 0, when its state starts at `key`: int64, broadcast.

    hash64(k, i) = mix(k + (i + 1) * 0x9E3779B97F4A7C15 mod 2**64); any int64 is allowed as key and as index, -1 included.
    """
    state = (index + 1).mul_(signed(GAMMA)) + (signed(key) if isinstance(key, int) else key)
    return mix_(state, torch.empty_like(state))


def hash64_np(key: int | NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
    """What hash64 gives, in numpy, for code that runs without torch."""
    start = np.asarray(signed(key) if isinstance(key, int) else key, np.int64).view(np.uint64)
    # At least one axis: numpy warns of overflow in scalars, and here it is meant.
    state = (np.atleast_1d(np.asarray(index, np.int64).view(np.uint64)) + np.uint64(1)) * np.uint64(GAMMA) + start
    return mix_np_(state, np.empty_like(state)).view(np.int64).reshape(np.broadcast_shapes(start.shape, np.shape(index)))


def _hash64_int(key: int, index: int) -> int:
    state = (key + (index + 1) * GAMMA) & MASK64
    for shift, factor in ROUNDS:
        state = ((state ^ (state >> shift)) * factor) & MASK64
    return signed(state ^ (state >> LAST_SHIFT))


@functools.lru_cache(maxsize=4096)
def name_bits(name: str) -> int:
    """A name as an int64: the first 8 bytes, little-endian, of the sha256 of its UTF-8 bytes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


@overload
def chain(*parts: int | str) -> int: ...  # type: ignore[overload-overlap]
@overload
def chain(*parts: int | str | Tensor) -> Tensor: ...
def chain(*parts: int | str | Tensor) -> int | Tensor:
    """One key from several parts, in order: k = 0, then k = hash64(k, part) for each; a name stands for name_bits(name).

    Integers count modulo 2**64. Without a tensor the result is a Python int (signed 64 bits), else int64, broadcast over the
    tensors; both give the same bits.
    """
    key: int | Tensor = 0
    for part in parts:
        if isinstance(part, Tensor):
            key = hash64(key, part)
        elif isinstance(key, Tensor):
            key = hash64(key, torch.full((), _integer(part), dtype=torch.int64, device=key.device))
        else:
            key = _hash64_int(key, _integer(part))
    return key


def chain_np(*parts: int | str | NDArray[np.int64]) -> NDArray[np.int64]:
    """What chain gives, in numpy; a 0-dim array where no part is an array."""
    key = np.zeros((), np.int64)
    for part in parts:
        key = hash64_np(key, part if isinstance(part, np.ndarray) else np.asarray(_integer(part), np.int64))
    return key


def _integer(part: int | str) -> int:
    return name_bits(part) if isinstance(part, str) else signed(operator.index(part))


def sample_keys(seed: int, stream: str, epoch: Tensor | None, uid: Tensor, passes: int) -> Tensor:
    """One key per MC pass and study, int64 (S, B): chain(seed, stream, pass, epoch, uid), the same on any rank and in any batch.

    Args:
        seed: of the job; an evaluation has its own.
        stream: what is drawn (an operation, a layer, a view).
        epoch: int64 (B,), of the source in which the sample is drawn; None in evaluation: chain(seed, stream, pass, uid).
        uid: int64 (B,); padding (-1) gets a key like any other.
        passes: S.
    """
    number = torch.arange(passes, dtype=torch.int64, device=uid.device)[:, None]
    first = hash64(chain(seed, stream), number)
    return hash64(first if epoch is None else hash64(first, epoch), uid)
