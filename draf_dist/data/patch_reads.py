"""The most that a patch of a volume takes from the store, from the schema alone: no pointer is read."""

import math

import numpy as np

from draf_dist.data.volumes import CRC_BYTES, GAP_SHARE
from draf_dist.data.working_set import Fetch
from draf_dist.schema.modality import VolumeSpec


def most_read(spec: VolumeSpec) -> Fetch:
    """An upper bound of the bytes and the requests (blocks) of one patch, wherever it lies.

    As if no chunk got smaller by compression, and none were asked for together with a neighbour.
    """
    sides = zip(spec.delivered, spec.chunk, spec.shape or (None, None, None), strict=True)
    num_chunks = spec.channels * math.prod(_most_chunks(*side) for side in sides)
    return Fetch(math.ceil(num_chunks * _frame_bytes(spec) * (1 + GAP_SHARE)), num_chunks)


def _most_chunks(wanted: int, chunk: int, whole: int | None) -> int:
    """Chunks that a patch can touch along an axis: one more than it fills, unless the volume has no more."""
    if wanted == whole:
        return -(-whole // chunk)
    touched = (wanted + chunk - 2) // chunk + 1
    return touched if whole is None else min(touched, -(-whole // chunk))


def _frame_bytes(spec: VolumeSpec) -> int:
    """The most bytes of a stored chunk: the bound of zstd (ZSTD_compressBound), and the crc32c."""
    raw = math.prod(spec.chunk) * np.dtype(spec.dtype).itemsize
    return raw + raw // 256 + max(0, 2**17 - raw) // 2**11 + CRC_BYTES
