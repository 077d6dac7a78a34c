"""3-D images read: a whole volume or a patch of it, straight into an array, by the bytes of the chunks that it touches.

A volume is a Zarr v3 array with the sharding codec; chunks are little-endian, zstd, crc32c, and nothing else is ever decoded: what
zarr.json says of codecs is not looked at here (docs/volumes.md). The pointer in the tar holds the index of the shards, so a patch
takes one round trip to the store.
"""

import functools
import itertools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray
from pydantic import ValidationError

from draf_dist.data.decode import MAX_POINTER_BYTES, Bytes, UndecodableError
from draf_dist.schema.modality import Sides, VolumeSpec
from draf_dist.schema.volume import ABSENT_CHUNK, VolumePointer, shard_path
from draf_dist.storage import MissingError, Store

Voxels = NDArray[np.int16] | NDArray[np.float16]

CACHED_POINTERS = 512
CRC_BYTES = 4
PATCH_STREAM = "volume patch"
# Steps that voxels are counted in, so that sums are whole numbers: every float16 is a multiple of the smallest one.
STEP = {"int16": 1.0, "float16": 2.0**-24}
# Chunks near one another are fetched together: the smallest gaps are closed first, none larger than GAP_BYTES, and what is fetched
# in vain stays below GAP_SHARE of what is wanted. One range stays below RANGE_BYTES (or is a single chunk).
GAP_BYTES = 128 * 2**10
GAP_SHARE = 0.2
RANGE_BYTES = 16 * 2**20
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_MASK64 = 2**64 - 1
_scratch = threading.local()


@dataclass(frozen=True, slots=True)
class RangeRead:
    """Bytes [start, stop) of an object of the release's store; sha256 is that of the whole object."""

    path: str
    sha256: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One touched chunk: its place in the grid of chunks, and its bytes [start, stop) in the content of read number `read`.

    read is -1 where the chunk is all fill and not stored.
    """

    place: tuple[int, ...]
    read: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class PatchPlan:
    """What a patch takes. start, size: (C, D, H, W). reads: what to fetch. touched_bytes: of the chunks alone."""

    pointer: VolumePointer
    start: tuple[int, ...]
    size: tuple[int, ...]
    reads: tuple[RangeRead, ...]
    chunks: tuple[_Chunk, ...]
    touched_bytes: int


def delivered_shape(spec: VolumeSpec) -> tuple[int, int, int, int]:
    """(C, D, H, W) of what the loader delivers of every volume."""
    return (spec.channels, *spec.delivered)


def open_pointer(data: Bytes, spec: VolumeSpec) -> VolumePointer:
    """The pointer in a tar's member; pointers that were opened lately are kept.

    Raises:
        UndecodableError: it is none, or that of a volume which the schema doesn't allow.
    """
    if len(data) > MAX_POINTER_BYTES:
        raise UndecodableError(f"{len(data)} bytes, expected a pointer to a volume of at most {MAX_POINTER_BYTES}")
    return _open_pointer(bytes(data), spec)


@functools.lru_cache(maxsize=CACHED_POINTERS)
def _open_pointer(data: bytes, spec: VolumeSpec) -> VolumePointer:
    try:
        pointer = VolumePointer.model_validate_json(data)
    except ValidationError as error:
        raise UndecodableError(f"no pointer to a volume ({error.errors()[0]['msg']})") from error
    channels, *sides = pointer.shape
    found = (pointer.dtype, channels, pointer.spacing_mm, pointer.chunk, pointer.fill)
    expected = (spec.dtype, spec.channels, spec.spacing_mm, (1, *spec.chunk), spec.fill)
    if found != expected:
        raise UndecodableError(f"a volume of type, channels, spacing, chunk and fill {found}, expected {expected}")
    if spec.shape is not None and tuple(sides) != spec.shape:
        raise UndecodableError(f"a volume of {sides} voxels, expected {list(spec.shape)}")
    if any(side < wanted for side, wanted in zip(sides, spec.delivered, strict=True)):
        raise UndecodableError(f"a volume of {sides} voxels, expected at least {list(spec.delivered)}")
    return pointer


def random_start(pointer: VolumePointer, spec: VolumeSpec, *, seed: int, epoch: int, uid: int) -> Sides:
    """Where the patch of a training sample begins: uniform over all places inside the volume.

    A pure function of (seed, epoch, uid) and the sizes, the same for all modalities of a study: volumes on one grid are cut alike.
    """
    # Here, because it brings torch along: processes that only index or check volumes start sooner without.
    from draf_dist.noise import chain

    places = _places(pointer, spec)
    bits = (chain(seed, PATCH_STREAM, epoch, uid, axis) & _MASK64 for axis in range(3))
    d, h, w = ((bit * count) >> 64 for bit, count in zip(bits, places, strict=True))
    return d, h, w


def centre_start(pointer: VolumePointer, spec: VolumeSpec) -> Sides:
    """Where the patch in the middle begins; of an odd remainder the larger half is at the end."""
    d, h, w = ((count - 1) // 2 for count in _places(pointer, spec))
    return d, h, w


def _places(pointer: VolumePointer, spec: VolumeSpec) -> list[int]:
    return [side - wanted + 1 for side, wanted in zip(pointer.shape[1:], spec.delivered, strict=True)]


def plan_patch(pointer: VolumePointer, spec: VolumeSpec, start: Sides) -> PatchPlan:
    """Which bytes the patch of the spec takes that begins at `start`, in voxels (D, H, W)."""
    return plan_box(pointer, (0, *start), delivered_shape(spec))


def plan_whole(pointer: VolumePointer) -> PatchPlan:
    """Which bytes the whole volume takes."""
    return plan_box(pointer, (0, 0, 0, 0), pointer.shape)


def plan_box(pointer: VolumePointer, start: tuple[int, ...], size: tuple[int, ...]) -> PatchPlan:
    """Which bytes a box takes; start and size in (C, D, H, W).

    Raises:
        ValueError: it does not lie inside the volume.
    """
    stops = [first + length for first, length in zip(start, size, strict=True)]
    if min(start) < 0 or min(size) < 1 or any(stop > side for stop, side in zip(stops, pointer.shape, strict=True)):
        raise ValueError(f"a box of {list(size)} at {list(start)} does not lie inside {list(pointer.shape)}")
    places = itertools.product(
        *(range(first // chunk, (stop - 1) // chunk + 1) for first, stop, chunk in zip(start, stops, pointer.chunk, strict=True))
    )
    reads: list[RangeRead] = []
    chunks: list[_Chunk] = []
    touched = 0
    for path, found in _by_shard(pointer, places).items():
        stored = sorted(item for item in found if item[1] != ABSENT_CHUNK)
        chunks += [_Chunk(place, -1, 0, 0) for _, size_bytes, place in found if size_bytes == ABSENT_CHUNK]
        touched += sum(size_bytes for _, size_bytes, _ in stored)
        sha256 = _shard_sha256(pointer, path)
        for run in _merged(stored):
            first, last = run[0][0], max(offset + size_bytes for offset, size_bytes, _ in run)
            chunks += [_Chunk(place, len(reads), offset - first, offset - first + length) for offset, length, place in run]
            reads.append(RangeRead(f"{pointer.folder}/{path}", sha256, first, last))
    return PatchPlan(pointer, start, size, tuple(reads), tuple(chunks), touched)


# Offset and size of a chunk in its shard, its place in the grid of chunks.
_Found = tuple[int, int, tuple[int, ...]]


def _by_shard(pointer: VolumePointer, places: Iterator[tuple[int, ...]]) -> dict[str, list[_Found]]:
    per_shard = pointer.chunks_per_shard
    found: dict[str, list[_Found]] = {}
    for place in places:
        path = shard_path(tuple(number // count for number, count in zip(place, per_shard, strict=True)))
        inside = tuple(number % count for number, count in zip(place, per_shard, strict=True))
        offset, size = pointer.tables.by_path[path][inside].tolist()
        found.setdefault(path, []).append((offset, size, place))
    return found


def _shard_sha256(pointer: VolumePointer, path: str) -> str:
    return next(shard.sha256 for shard in pointer.shards if shard.path == path)


def _merged(stored: Sequence[_Found]) -> Iterator[Sequence[_Found]]:
    """Runs of chunks that are fetched as one range, by the rule that GAP_BYTES states."""
    budget = GAP_SHARE * sum(size for _, size, _ in stored)
    gaps = sorted((max(0, after[0] - before[0] - before[1]), i) for i, (before, after) in enumerate(itertools.pairwise(stored), 1))
    closed: set[int] = set()
    for gap, i in gaps:
        budget -= gap
        if gap > GAP_BYTES or budget < 0:
            break
        closed.add(i)
    run: list[_Found] = []
    for i, (offset, size, place) in enumerate(stored):
        if run and (i not in closed or offset + size - run[0][0] > RANGE_BYTES):
            yield run
            run = []
        run.append((offset, size, place))
    if run:
        yield run


def fetch_patch(store: Store, plan: PatchPlan) -> list[Bytes]:
    """What the plan reads, in its order; one call of the store per shard.

    Raises:
        UndecodableError: an object is not there, or shorter than the pointer says.
        UnreachableError: the store does not answer, or refuses the credentials.
    """
    contents: list[Bytes] = []
    for path, group in itertools.groupby(plan.reads, key=lambda read: read.path):
        ranges = [(read.start, read.stop) for read in group]
        try:
            contents += _read_ranges(store, path, ranges)
        except MissingError as error:
            raise UndecodableError(f"{plan.pointer.folder}: an object of the volume is not there") from error
    for read, content in zip(plan.reads, contents, strict=True):
        if len(content) != read.stop - read.start:
            raise UndecodableError(f"{read.path}: {len(content)} bytes at {read.start}, expected {read.stop - read.start}")
    return contents


def _read_ranges(store: Store, path: str, ranges: Sequence[tuple[int, int]]) -> Sequence[Bytes]:
    if (local := store.local_path(path)) is not None:
        # One open file for all ranges; what goes wrong is told by the store.
        with suppress(OSError), local.open("rb", buffering=0) as file:
            return [os.pread(file.fileno(), stop - start, start) for start, stop in ranges]
    return store.read_ranges(path, ranges)


def decode_patch(plan: PatchPlan, contents: Sequence[Bytes], out: Voxels) -> None:
    """Decodes what was fetched into `out`, (C, d, h, w) of the plan's size and the volume's type; every voxel is written.

    Raises:
        UndecodableError: a chunk is damaged; says which volume and chunk.
    """
    pointer = plan.pointer
    if out.shape != plan.size or out.dtype != np.dtype(pointer.dtype):
        raise ValueError(f"expected an array {pointer.dtype} {plan.size}, found {out.dtype} {out.shape}")
    for chunk in plan.chunks:
        inside, target = _overlap(chunk.place, pointer.chunk, plan.start, plan.size)
        if chunk.read < 0:
            out[target] = pointer.fill
            continue
        try:
            voxels = _decode_chunk(memoryview(contents[chunk.read])[chunk.start : chunk.stop], pointer)
        except UndecodableError as error:
            raise UndecodableError(f"{pointer.folder}: chunk {'/'.join(map(str, chunk.place))}: {error}") from error
        out[target] = voxels[inside]


def _overlap(
    place: tuple[int, ...], chunk: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of a chunk that lies in a box: where it is in the chunk, and where in the box."""
    inside, target = [], []
    for number, side, first, length in zip(place, chunk, start, size, strict=True):
        low, high = max(number * side, first), min((number + 1) * side, first + length)
        inside.append(slice(low - number * side, high - number * side))
        target.append(slice(low - first, high - first))
    return tuple(inside), tuple(target)


def _decode_chunk(content: memoryview, pointer: VolumePointer) -> Voxels:
    """The chunk in an array that the next call of this thread writes over."""
    data, crc = content[:-CRC_BYTES], bytes(content[-CRC_BYTES:])
    if len(content) <= CRC_BYTES or google_crc32c.value(bytes(data)).to_bytes(4, "little") != crc:
        raise UndecodableError("other bytes than were written (crc32c)")
    voxels = _chunk_array(pointer)
    if _content_bytes(data) != voxels.nbytes:
        raise UndecodableError(f"a zstd frame of another size than {voxels.nbytes} bytes")
    try:
        zstd.decompress(data, voxels)
    except (RuntimeError, ValueError) as error:
        raise UndecodableError("a damaged zstd frame") from error
    return voxels


def _chunk_array(pointer: VolumePointer) -> Voxels:
    key = (pointer.chunk, pointer.dtype)
    if getattr(_scratch, "key", None) != key:
        _scratch.key, _scratch.array = key, np.empty(pointer.chunk, dtype=pointer.dtype)
    array: Voxels = _scratch.array
    return array


def _content_bytes(frame: memoryview) -> int | None:
    """What a zstd frame says that it unpacks to (RFC 8878, 3.1.1.1); None where it does not say."""
    if len(frame) < 6 or bytes(frame[:4]) != _ZSTD_MAGIC:
        return None
    descriptor = frame[4]
    size_flag, is_single = descriptor >> 6, descriptor >> 5 & 1
    width = (is_single, 2, 4, 8)[size_flag]
    first = 5 + (0 if is_single else 1) + (0, 1, 2, 4)[descriptor & 3]
    size = int.from_bytes(frame[first : first + width], "little")
    return None if width == 0 else size + 256 if width == 2 else size


def read_patch(store: Store, data: Bytes, spec: VolumeSpec, start: Sides, out: Voxels) -> None:
    """Fetches and decodes the patch of a pointer's volume that begins at `start`; raises as the steps it is made of."""
    plan = plan_patch(open_pointer(data, spec), spec, start)
    decode_patch(plan, fetch_patch(store, plan), out)


def read_whole(store: Store, pointer: VolumePointer) -> Voxels:
    """A whole volume (C, D, H, W); raises as `read_patch`."""
    out: Voxels = np.empty(pointer.shape, dtype=pointer.dtype)
    plan = plan_whole(pointer)
    decode_patch(plan, fetch_patch(store, plan), out)
    return out


def raw_bytes(pointer: VolumePointer) -> int:
    """Bytes of the voxels, unpacked."""
    return math.prod(pointer.shape) * np.dtype(pointer.dtype).itemsize
