"""The npy format, version 1.0, read without numpy's own reader.

That one evaluates the header as a Python literal, which is slow, fails in many ways, and in CPython 3.11 is not safe in threads: a
switch of threads in mid-parse ends in `SystemError: AST constructor recursion depth mismatch` (python/cpython#106905).
"""

import math
import re
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_START = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(rb"\{'descr': '([^']*)', 'fortran_order': False, 'shape': \(([0-9, ]*?),?\), \} *\n?")


def is_npy(start: bytes) -> bool:
    """Whether a file that begins so, with at least 6 bytes, is an npy of any version."""
    return start.startswith(_START[:6])


def decode_npy(data: bytes | memoryview, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The array, which shares the memory of data.

    Raises:
        ValueError: no npy 1.0 in C order, another type, or not as many bytes as its header says.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    if bytes(data[:8]) != _START or len(data) < start:
        raise ValueError("no npy of version 1.0")
    shape = _shape(bytes(data[10:start]), dtype)
    num_bytes = dtype.itemsize * math.prod(shape)
    if len(data) - start != num_bytes:
        raise ValueError(f"{len(data) - start} bytes of values, expected {num_bytes}")
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape)


# The members of a modality all have the same header.
@lru_cache(maxsize=64)
def _shape(header: bytes, dtype: np.dtype[Any]) -> tuple[int, ...]:
    found = _HEADER.fullmatch(header)
    if found is None or found[1] != dtype.str.encode():
        raise ValueError(f"another type than {dtype}, or another order than C")
    return tuple(int(side) for side in found[2].replace(b" ", b"").split(b",") if side)
