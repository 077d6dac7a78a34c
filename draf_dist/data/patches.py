"""Patches of volumes for the rows of a chunk: found through the pointers in the tar, fetched before they are decoded."""

from collections.abc import Sequence
from dataclasses import dataclass

from draf_dist.data.decode import Bytes
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
from draf_dist.schema.modality import VolumeSpec
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
        if self.seed is None:
            return plan_patch(opened, spec, centre_start(opened, spec))
        return plan_patch(opened, spec, random_start(opened, spec, seed=self.seed, epoch=epoch, uid=uid))


CENTRE = PatchRule()


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
