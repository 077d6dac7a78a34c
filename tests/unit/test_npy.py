"""Reading npy: what numpy writes, nothing else, and nothing evaluated."""

import ast
import io

import numpy as np
import pytest

from draf_dist.data.npy import decode_npy, is_npy


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version, allow_pickle=False)
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 1, 3)])
def test_what_numpy_writes_is_read_without_its_parser(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(np.prod(shape), dtype="<i8").reshape(shape)
    data = npy(array)
    # Not safe in threads, and threads read these.
    monkeypatch.setattr(ast, "literal_eval", None)
    assert is_npy(data)
    found = decode_npy(memoryview(data), np.dtype("<i8"))
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array)


@pytest.mark.parametrize(
    "data",
    [
        npy(np.zeros((2, 3), "<f4")),
        npy(np.asfortranarray(np.zeros((2, 3), "<i8"))),
        npy(np.zeros((2, 3), "<i8"), version=(2, 0)),
        npy(np.zeros((2, 3), "<i8"))[:-1],
        npy(np.zeros((2, 3), "<i8")) + b"\0",
        npy(np.zeros((2, 3), "<i8"))[:40],
        npy(np.zeros((2, 3), "<i8")).replace(b"(2, 3)", b"(2,-3)"),
        b"\x93NUMPY",
    ],
)
def test_all_else_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"npy|type|bytes"):
        decode_npy(data, np.dtype("<i8"))
