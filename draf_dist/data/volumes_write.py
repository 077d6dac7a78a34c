"""3-D images written: voxels -> the objects of a Zarr array and the pointer that names them.

zarr writes into memory, whole shards only: one writer a shard, and nothing is ever changed afterwards. The folder is named after
what lies in it, so an object that is there already, with the right size, is the one that would be written.
"""

import base64
import hashlib
import math
from typing import Any

import numpy as np

from draf_dist.config.spec import canonical_json
from draf_dist.data.decode import MAX_POINTER_BYTES
from draf_dist.data.volumes import STEP, Voxels
from draf_dist.schema.modality import MAX_SIDE, VolumeSpec
from draf_dist.schema.volume import (
    INDEX_CRC_BYTES,
    INDEX_ENTRY_BYTES,
    MAX_VOXELS,
    METADATA,
    StoredObject,
    StoredShard,
    VolumePointer,
)

ZSTD_LEVEL = 1
# Of the voxels of a shard, unpacked: a volume of at most this size is one object beside its zarr.json.
SHARD_BYTES = 128 * 2**20
# More than a pointer takes beside the indexes of its shards, and a shard beside its own.
POINTER_BYTES, POINTER_SHARD_BYTES = 1024, 256
AXES = ("channel", "superior", "anterior", "right")


def encode_volume(voxels: Voxels, spec: VolumeSpec) -> tuple[VolumePointer, dict[str, bytes]]:
    """The pointer of a volume (C, D, H, W) and its objects, by path in the release's store, in the order to write them."""
    chunk = (1, *spec.chunk)
    shard = shard_shape(voxels.shape, chunk, voxels.itemsize)
    contents = _zarr_objects(voxels, spec, chunk, shard)
    metadata = _stored(METADATA, contents[METADATA])
    shards = tuple(_stored_shard(path, contents[path], shard, chunk) for path in sorted(set(contents) - {METADATA}))
    total, total_squares = sums(voxels)
    pointer = VolumePointer(
        digest=digest_of((*shards, metadata)),
        dtype=spec.dtype,
        shape=voxels.shape,
        spacing_mm=spec.spacing_mm,
        chunk=chunk,
        shard=shard,
        fill=spec.fill,
        total=total,
        total_squares=total_squares,
        voxels_sha256=voxels_sha256(voxels),
        metadata=metadata,
        shards=shards,
    )
    return pointer, {f"{pointer.folder}/{stored.path}": contents[stored.path] for stored in pointer.objects}


def shard_shape(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int) -> tuple[int, int, int, int]:
    """The whole array in one shard, or as many whole layers of chunks as SHARD_BYTES holds (at least one)."""
    c, d, h, w = (-(-side // step) * step for side, step in zip(shape, chunk, strict=True))
    layer_bytes = c * chunk[1] * h * w * itemsize
    layers = max(1, min(d // chunk[1], SHARD_BYTES // layer_bytes))
    return c, layers * chunk[1], h, w


def size_problem(shape: tuple[int, ...], spec: VolumeSpec) -> str | None:
    """Why a volume (C, D, H, W) can't be stored, or couldn't be read again; None where it can. Nothing is allocated."""
    chunk = (1, *spec.chunk)
    shard = shard_shape(shape, chunk, np.dtype(spec.dtype).itemsize)
    for what, (_, *sides) in (("the volume", shape), ("a shard of whole chunks", shard)):
        if max(sides) > MAX_SIDE or math.prod(sides) * spec.channels > MAX_VOXELS:
            found = f"{sides} voxels at {list(spec.spacing_mm)} mm in {what}"
            return f"{found}; at most {MAX_VOXELS} are allowed, {MAX_SIDE} along an axis"
    if pointer_bytes(shape, shard, chunk) > MAX_POINTER_BYTES:
        return f"{_count(shape, chunk)} chunks of {list(spec.chunk)} voxels, more than a pointer can list; give a larger `chunk`"
    return None


def pointer_bytes(shape: tuple[int, ...], shard: tuple[int, ...], chunk: tuple[int, ...]) -> int:
    """The most that the pointer of such a volume takes."""
    num_shards = _count(shape, shard)
    index_bytes = INDEX_ENTRY_BYTES * _count(shard, chunk) + INDEX_CRC_BYTES
    return POINTER_BYTES + num_shards * (POINTER_SHARD_BYTES + 4 * -(-index_bytes // 3))


def digest_of(objects: tuple[StoredObject, ...]) -> str:
    """The name of a volume: sha256 of the canonical JSON of (path, size, sha256) of all its objects, by path."""
    parts = sorted([stored.path, stored.size_bytes, stored.sha256] for stored in objects)
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def voxels_sha256(voxels: Voxels) -> str:
    """Of the values alone: little-endian, in C order."""
    return hashlib.sha256(np.ascontiguousarray(voxels, dtype=voxels.dtype.newbyteorder("<")).data).hexdigest()


def sums(voxels: Voxels) -> tuple[int, int]:
    """Sum and sum of squares in steps of the type, exact: by counting how often each of the 65,536 values occurs."""
    counts = np.bincount(np.ascontiguousarray(voxels).view(np.uint16).ravel(), minlength=65536)
    bits = np.flatnonzero(counts)
    values = bits.astype(np.uint16).view(voxels.dtype).astype(np.float64) / STEP[voxels.dtype.name]
    whole = [(int(value), int(count)) for value, count in zip(values, counts[bits], strict=True)]
    return sum(value * count for value, count in whole), sum(value * value * count for value, count in whole)


def _zarr_objects(voxels: Voxels, spec: VolumeSpec, chunk: tuple[int, ...], shard: tuple[int, ...]) -> dict[str, bytes]:
    # A second to import, and most releases have no volumes.
    from zarr import create_array
    from zarr.codecs import Crc32cCodec, ZstdCodec
    from zarr.storage import MemoryStore

    contents: dict[str, Any] = {}
    array = create_array(
        MemoryStore(contents),
        shape=voxels.shape,
        dtype=spec.dtype,
        chunks=chunk,
        shards=shard,
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        fill_value=spec.fill,
        attributes={"spacing_mm": list(spec.spacing_mm), "orientation": "RAS", "unit": spec.unit},
        dimension_names=AXES,
        # A shard that is all fill would be left out, and what is missing could not be told from what was lost.
        config={"write_empty_chunks": True} if _has_empty_shard(voxels, shard, spec.fill) else None,
    )
    array[...] = voxels
    return {path: buffer.to_bytes() for path, buffer in contents.items()}


def _has_empty_shard(voxels: Voxels, shard: tuple[int, ...], fill: int) -> bool:
    layers = range(0, voxels.shape[1], shard[1])
    return any((voxels[:, start : start + shard[1]] == fill).all() for start in layers)


def _stored(path: str, content: bytes) -> StoredObject:
    return StoredObject(path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _stored_shard(path: str, content: bytes, shard: tuple[int, ...], chunk: tuple[int, ...]) -> StoredShard:
    index = content[-(INDEX_ENTRY_BYTES * _count(shard, chunk) + INDEX_CRC_BYTES) :]
    return StoredShard(**_stored(path, content).model_dump(), index=base64.b64encode(index).decode())


def _count(sides: tuple[int, ...], part: tuple[int, ...]) -> int:
    """Parts that an array takes; at its upper edges they reach beyond it."""
    return math.prod(-(-side // step) for side, step in zip(sides, part, strict=True))
