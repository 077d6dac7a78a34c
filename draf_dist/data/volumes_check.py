"""Whether a volume is, byte for byte, what its pointer says: objects, metadata, index, voxels and sums."""

import base64
import hashlib
import json
from typing import Any

import numpy as np

from draf_dist.data.decode import UndecodableError
from draf_dist.data.descent import broken
from draf_dist.data.volumes import Voxels, decode_patch, plan_whole
from draf_dist.data.volumes_write import digest_of, sums, voxels_sha256
from draf_dist.schema.volume import METADATA, StoredObject, VolumePointer
from draf_dist.storage import MissingError, Store

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}


def check_volume(store: Store, pointer: VolumePointer) -> int:
    """Reads all of a volume; memory holds its bytes and its voxels. Returns its bytes as they are stored.

    Raises:
        DataError: names the first object that is not what the pointer says.
        UnreachableError: the store does not answer.
    """
    if digest_of((*pointer.shards, pointer.metadata)) != pointer.digest:
        raise broken(store.where(pointer.folder), "a folder named after its content", "another name")
    contents = {stored.path: _read(store, pointer, stored) for stored in pointer.objects}
    # Chunks first, so that what is broken has a name; then the objects as a whole.
    voxels = _decoded(store, pointer, contents)
    for stored in pointer.objects:
        if hashlib.sha256(contents[stored.path]).hexdigest() != stored.sha256:
            expected = f"{stored.size_bytes} bytes with sha256 {stored.sha256[:16]}..."
            raise broken(store.where(f"{pointer.folder}/{stored.path}"), expected, "other bytes (no chunk is damaged)")
    _check_metadata(store, pointer, contents[METADATA])
    for shard in pointer.shards:
        index = base64.b64decode(shard.index)
        if contents[shard.path][-len(index) :] != index:
            raise broken(store.where(f"{pointer.folder}/{shard.path}"), "the index that the pointer has", "another")
    if voxels_sha256(voxels) != pointer.voxels_sha256 or sums(voxels) != (pointer.total, pointer.total_squares):
        raise broken(store.where(pointer.folder), "voxels with the sums and sha256 of the pointer", "others")
    return sum(stored.size_bytes for stored in pointer.objects)


def expected_metadata(pointer: VolumePointer) -> dict[str, Any]:
    """What zarr.json must say: no codec but bytes, zstd and crc32c. The level of zstd and the attributes are free."""
    sharding = {
        "chunk_shape": list(pointer.chunk),
        "codecs": [_BYTES, {"name": "zstd"}, _CRC],
        "index_codecs": [_BYTES, _CRC],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(pointer.shape),
        "data_type": pointer.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(pointer.shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": pointer.fill,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "storage_transformers": [],
    }


def _read(store: Store, pointer: VolumePointer, stored: StoredObject) -> bytes:
    path = f"{pointer.folder}/{stored.path}"
    try:
        content = store.read(path)
    except MissingError as error:
        raise broken(store.where(path), "an object of a volume", "nothing") from error
    if len(content) != stored.size_bytes:
        raise broken(store.where(path), f"{stored.size_bytes} bytes", f"{len(content)}")
    return content


def _decoded(store: Store, pointer: VolumePointer, contents: dict[str, bytes]) -> Voxels:
    plan = plan_whole(pointer)
    by_path = {f"{pointer.folder}/{path}": content for path, content in contents.items()}
    voxels: Voxels = np.empty(pointer.shape, dtype=pointer.dtype)
    try:
        decode_patch(plan, [by_path[read.path][read.start : read.stop] for read in plan.reads], voxels)
    except UndecodableError as error:
        raise broken(store.where(pointer.folder), "chunks as they were written", str(error)) from error
    return voxels


def _check_metadata(store: Store, pointer: VolumePointer, content: bytes) -> None:
    where, expected = store.where(f"{pointer.folder}/{METADATA}"), expected_metadata(pointer)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise broken(where, "the JSON of a Zarr array", "no JSON") from error
    for name, value in expected.items():
        if not isinstance(found, dict) or _without_levels(found.get(name)) != value:
            raise broken(where, f"{name} as the pointer says", "another")


def _without_levels(value: object) -> object:
    """The value with zstd's settings left out: they don't matter to a reader."""
    if isinstance(value, list):
        return [_without_levels(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("name") == "zstd":
        return {"name": "zstd"}
    return {key: _without_levels(item) for key, item in value.items()}
