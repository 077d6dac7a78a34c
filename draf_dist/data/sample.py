"""One sample of a step: where its members lie, their bytes, checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from isal.isal_zlib import crc32

from draf_dist.data.decode import Bytes, UndecodableError
from draf_dist.data.patches import Patch, PatchRule
from draf_dist.data.shard_reader import Found, IntArray, ShardReader
from draf_dist.data.shards import ABSENT, OFFSET
from draf_dist.errors import DataError
from draf_dist.schema.label import SegmentationSpec
from draf_dist.schema.modality import VolumeSpec

DecodedT = TypeVar("DecodedT")


class Members(Protocol):
    """Where the bytes of members come from."""

    def read(self, shard: int, offset: int, size: int) -> Bytes:
        """Bytes [offset, offset + size) of a shard, unchecked."""
        ...

    def read_again(self, shard: int, offset: int, size: int) -> Bytes:
        """The same, past any copy that could be at fault."""
        ...


@dataclass(frozen=True)
class Source:
    """What samples of one release are read with. partners: column -> for every sample the sample whose modality it gets.

    is_local: the shards lie on a disk of this machine.
    """

    reader: ShardReader
    members: Members
    partners: Mapping[int, IntArray]
    patch_rule: PatchRule
    is_local: bool


class Sample:
    """Sample `number` of a source, which lies at `found`, drawn in an epoch of the source."""

    def __init__(self, source: Source, number: int, epoch: int, found: Found) -> None:
        self.source, self.epoch, self.found = source, epoch, found
        self._number = number

    @property
    def uid(self) -> int:
        """Its uid, by the index."""
        return int(self.found.shard_index.uids[self.found.place])

    def place_of(self, column: int) -> tuple[Found, bool]:
        """Where a modality of it lies, and whether that is another sample's.

        Raises:
            DataError: the shard of that other sample can't be read.
        """
        partners = self.source.partners.get(column)
        if partners is None or partners[self._number] == self._number:
            return self.found, False
        (other,) = self.source.reader.find(np.array([partners[self._number]], dtype=np.int64))
        if isinstance(other, DataError):
            raise other
        return other, True

    def read(self, found: Found, column: int) -> Bytes:
        """The bytes of a member, checked; a second look where the first is not what was written.

        Raises:
            DataError: they are others, or gone.
        """
        offset, size, crc = found.table[column]
        for read in (self.source.members.read, self.source.members.read_again):
            content = read(found.shard, offset, size)
            if len(content) == size and crc32(content) == crc:
                return content
        raise self._error(found, column, f"{size} bytes with crc32 {crc:08x}", "other bytes")

    def decoded(self, found: Found, column: int, decode: Callable[[], DecodedT]) -> DecodedT:
        """What a decoder makes of a member; what it can't decode becomes an error that names the member.

        Raises:
            DataError: it can't be decoded.
        """
        try:
            return decode()
        except UndecodableError as error:
            raise self._error(found, column, "a file as schema.json describes it", str(error)) from error

    def another_uid(self) -> DataError:
        """The error for a json that is another sample's."""
        return self._error(self.found, len(self.found.table) - 1, "the uid that its name says", "another")

    def without_mask(self) -> DataError:
        """The error for a sample whose json speaks of a mask that is not there."""
        return self._error(self.found, len(self.found.table) - 1, "a mask, as it says", "none")

    def patch(self, column: int) -> Patch | None:
        """Fetches the patch of a volume; None where there is none.

        Raises:
            DataError: the pointer is damaged, or an object of the volume.
            UnreachableError: the store does not answer.
        """
        found, _ = self.place_of(column)
        if found.table[column][OFFSET] == ABSENT:
            return None
        reader, uid = self.source.reader, int(found.shard_index.uids[found.place])
        spec = reader.release.schema.modalities[column]
        assert isinstance(spec, VolumeSpec)
        pointer = self.read(found, column)
        plan = self.decoded(found, column, lambda: self.source.patch_rule.plan(pointer, spec, epoch=self.epoch, uid=uid))
        return self.decoded(found, column, lambda: Patch.fetched(plan, reader.release.store))

    def mask(self) -> Patch | None:
        """Fetches the patch of the mask, of the voxels of its own image's patch; None where there is none.

        Raises:
            DataError: a pointer is damaged, or an object of the mask.
            UnreachableError: the store does not answer.
        """
        reader, found, uid = self.source.reader, self.found, self.uid
        schema = reader.release.schema
        spec, column = schema.mask, len(schema.modalities)
        if spec is None or found.table[column][OFFSET] == ABSENT:
            return None
        assert isinstance(schema.label, SegmentationSpec)  # or there were no spec
        outlined = schema.names.index(schema.label.modality)
        image = schema.modalities[outlined]
        assert isinstance(image, VolumeSpec)
        if found.table[outlined][OFFSET] == ABSENT:
            raise self._error(found, column, f"a mask beside its {image.name}", f"no {image.name}")
        pointer, image_pointer = self.read(found, column), self.read(found, outlined)
        rule = self.source.patch_rule
        plan = self.decoded(found, column, lambda: rule.plan_mask(pointer, spec, image_pointer, image, epoch=self.epoch, uid=uid))
        return self.decoded(found, column, lambda: Patch.fetched(plan, reader.release.store))

    def _error(self, found: Found, column: int, expected: str, what: str) -> DataError:
        return self.source.reader.error(found.shard, found.place, column, expected=expected, found=what)
