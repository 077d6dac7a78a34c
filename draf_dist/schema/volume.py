"""What a shard holds of a 3-D image: a pointer that names every byte of it in the release's folder of volumes."""

import base64
import binascii
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from draf_dist.schema.modality import Side
from draf_dist.schema.record import Record

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Shape = tuple[Annotated[int, Field(ge=1, le=64)], Side, Side, Side]
METADATA = "zarr.json"
# Per chunk of a shard: offset and size, uint64; then the crc32c of all of them (Zarr v3, sharding codec, index at the end).
INDEX_ENTRY_BYTES = 16
INDEX_CRC_BYTES = 4
MAX_VOXELS = 2**30


class StoredObject(Record):
    """One object of a volume: its place below the volume's folder, its size and sha256."""

    path: str = Field(pattern=r"^(zarr\.json|c(/[0-9]{1,4}){4})$")
    size_bytes: int = Field(ge=1)
    sha256: Sha256


class StoredShard(StoredObject):
    """One shard. index: the last bytes of the object in base64: where its chunks are."""

    index: str


class VolumePointer(Record):
    """A volume of a release: Zarr v3 array (C, D, H, W) in `volumes/<digest>.zarr/`.

    digest: sha256 over path, size and sha256 of all objects (`digest_of`), so it stands for every byte. chunk, shard: shapes; a
    shard holds whole chunks, at the upper edges beyond the array. spacing_mm: (D, H, W). total, total_squares: sums over the
    voxels, counted in `step`s of the type, whole numbers. voxels_sha256: of the array, little-endian, in C order.
    """

    format: Literal["draf-volume-1"] = "draf-volume-1"
    digest: Sha256
    dtype: Literal["int16", "float16"]
    shape: Shape
    spacing_mm: tuple[float, float, float]
    chunk: Shape
    shard: Shape
    fill: int
    total: int
    total_squares: int = Field(ge=0)
    voxels_sha256: Sha256
    metadata: StoredObject
    shards: tuple[StoredShard, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _hangs_together(self) -> "VolumePointer":
        if math.prod(self.shape) > MAX_VOXELS or math.prod(self.shard) > MAX_VOXELS:
            raise ValueError("too many voxels")
        if any(shard % chunk for shard, chunk in zip(self.shard, self.chunk, strict=True)):
            raise ValueError("a shard must hold whole chunks")
        expected = {shard_path(place) for place in np.ndindex(*self.shard_grid)}
        if self.metadata.path != METADATA or len(self.shards) != len(expected) or {s.path for s in self.shards} != expected:
            raise ValueError("other objects than the shape asks for")
        # Unpacks and checks them.
        _ = self.tables
        return self

    @property
    def folder(self) -> str:
        """Where the volume lies in the store of its release."""
        return f"volumes/{self.digest}.zarr"

    @property
    def objects(self) -> Iterator[StoredObject]:
        """All objects, the shards first: the order in which they are written."""
        yield from self.shards
        yield self.metadata

    @property
    def shard_grid(self) -> tuple[int, ...]:
        """Shards along each axis."""
        return tuple(-(-side // shard) for side, shard in zip(self.shape, self.shard, strict=True))

    @property
    def chunks_per_shard(self) -> tuple[int, ...]:
        """Chunks of one shard along each axis."""
        return tuple(shard // chunk for shard, chunk in zip(self.shard, self.chunk, strict=True))

    @cached_property
    def tables(self) -> "ChunkTables":
        """Where every chunk lies."""
        return ChunkTables({shard.path: self._table(shard) for shard in self.shards})

    def _table(self, shard: StoredShard) -> NDArray[np.uint64]:
        try:
            index = base64.b64decode(shard.index, validate=True)
        except binascii.Error as error:
            raise ValueError("an index that is no base64") from error
        num_bytes = INDEX_ENTRY_BYTES * math.prod(self.chunks_per_shard)
        if len(index) != num_bytes + INDEX_CRC_BYTES:
            raise ValueError("an index of another number of chunks")
        table = np.frombuffer(index[:num_bytes], dtype="<u8").reshape(*self.chunks_per_shard, 2)
        stored = table[table[..., 1] != ABSENT_CHUNK]
        end = np.uint64(max(0, shard.size_bytes - len(index)))
        # One by one, for a sum of two large numbers would wrap.
        if (stored > end).any() or (stored[:, 0] > end - stored[:, 1]).any():
            raise ValueError("an index that leads out of its shard")
        return table


@dataclass(frozen=True, eq=False)
class ChunkTables:
    """Path of a shard -> (offset, size) of its chunks, uint64 (*chunks_per_shard, 2); both 2**64 - 1 where all is fill.

    Compared by identity: pydantic compares pointers by all that they keep, and arrays have no single answer.
    """

    by_path: dict[str, NDArray[np.uint64]]


ABSENT_CHUNK = np.uint64(2**64 - 1)


def shard_path(place: tuple[int, ...]) -> str:
    """Where the shard at a place of the grid lies below the volume's folder."""
    return "/".join(["c", *(str(number) for number in place)])
