"""Patches of volumes for the rows of a chunk: found through the pointers in the tar, fetched before they are decoded."""

from collections.abc import Sequence
from dataclasses import dataclass

from draf_dist.data.decode import Bytes, UndecodableError
from draf_dist.data.volumes import (
    PatchPlan,
    Voxels,
    centre_start,
    decode_patch,
    fetch_patch,
    open_pointer,
    plan_patch,
    random_start,
)
from draf_dist.schema.modality import Sides, VolumeSpec
from draf_dist.schema.volume import VolumePointer
from draf_dist.storage import Store


@dataclass(frozen=True)
class PatchRule:
    """Where patches lie: seed None means in the middle, as evaluation has it; else drawn by (seed, epoch, uid)."""

    seed: int | None = None

    def plan(self, pointer: Bytes, spec: VolumeSpec, *, epoch: int, uid: int) -> PatchPlan:
        """What to read for a study's volume.

        Raises:
            UndecodableError: the member is no pointer to a volume of the schema.
        """
        opened = open_pointer(pointer, spec)
        return plan_patch(opened, spec, self._start(opened, spec, epoch=epoch, uid=uid))

    def plan_mask(
        self, pointer: Bytes, spec: VolumeSpec, image: Bytes, image_spec: VolumeSpec, *, epoch: int, uid: int
    ) -> PatchPlan:
        """What to read of a mask: the very voxels that `plan` reads of its image.

        Raises:
            UndecodableError: a member is no pointer to a volume of the schema, or the two are of different sizes.
        """
        opened, outlined = open_pointer(pointer, spec), open_pointer(image, image_spec)
        check_mask_grid(opened, outlined)
        return plan_patch(opened, spec, self._start(outlined, image_spec, epoch=epoch, uid=uid))

    def _start(self, pointer: VolumePointer, spec: VolumeSpec, *, epoch: int, uid: int) -> Sides:
        if self.seed is None:
            return centre_start(pointer, spec)
        return random_start(pointer, spec, seed=self.seed, epoch=epoch, uid=uid)


CENTRE = PatchRule()


def check_mask_grid(mask: VolumePointer, image: VolumePointer) -> None:
    """Raises UndecodableError where a mask has other voxels than its image; spacing and chunks are those of the schema."""
    if mask.shape[1:] != image.shape[1:]:
        raise UndecodableError(f"a mask of {list(mask.shape[1:])} voxels, expected the {list(image.shape[1:])} of its image")


@dataclass(frozen=True)
class Patch:
    """One that was fetched."""

    plan: PatchPlan
    contents: Sequence[Bytes]

    @classmethod
    def fetched(cls, plan: PatchPlan, store: Store) -> "Patch":
        """Reads what a plan says; raises as `volumes.fetch_patch`."""
        return cls(plan, fetch_patch(store, plan))

    @property
    def size_bytes(self) -> int:
        """Of what was read for it."""
        return sum(map(len, self.contents))

    def decode(self, out: Voxels) -> None:
        """Decodes it into an array (C, d, h, w); raises as `volumes.decode_patch`."""
        decode_patch(self.plan, self.contents, out)
