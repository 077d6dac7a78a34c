"""Studies of a release with masks, each as patches that cover the whole of its volume, with the targets of the same voxels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from draf_dist.data.decode import Bytes
from draf_dist.data.loader import Portion, SplitLoader
from draf_dist.data.patches import CENTRE, check_mask_grid
from draf_dist.data.release import Release
from draf_dist.data.sample import Sample, Source
from draf_dist.data.shard_reader import Found, ShardReader
from draf_dist.data.shards import ABSENT, OFFSET
from draf_dist.data.tiles import Tile, cover
from draf_dist.data.volumes import Voxels, open_pointer, read_whole
from draf_dist.errors import DataError, SpecError, explain
from draf_dist.schema.batch import Batch, SegmentationTarget
from draf_dist.schema.label import SegmentationSpec
from draf_dist.schema.modality import VolumeSpec
from draf_dist.schema.release import Split
from draf_dist.schema.volume import VolumePointer


@dataclass(frozen=True)
class WholeVolume:
    """A study. row: it alone as evaluation batches have it, patches in the middle. tiles: cover the volume that was outlined.

    volumes: modality -> voxels (C, D, H, W) of it and of all others on the same voxels. mask: int16 (1, D, H, W); None where the
    study has none.
    """

    row: Batch
    tiles: tuple[Tile, ...]
    patch: tuple[int, int, int]
    volumes: Mapping[str, Voxels]
    mask: Voxels | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(D, H, W)."""
        return next(iter(self.volumes.values())).shape[1:]

    def batches(self, num_rows: int) -> Iterator[tuple[Sequence[Tile], Batch]]:
        """At most num_rows tiles at a time, and the batch that holds them: a row a tile, its target the mask of the same voxels.

        All rows are the one study: what is no volume on these voxels is the same in each.
        """
        for first in range(0, len(self.tiles), num_rows):
            tiles = self.tiles[first : first + num_rows]
            yield tiles, self._batch(tiles)

    def _batch(self, tiles: Sequence[Tile]) -> Batch:
        repeated = self.row.map(lambda tensor: tensor.expand(len(tiles), *tensor.shape[1:]))
        cut = {name: torch.from_numpy(self._cut(voxels, tiles)) for name, voxels in self.volumes.items()}
        return replace(repeated, inputs={**repeated.inputs, **cut}, target=self._target(tiles))

    def _target(self, tiles: Sequence[Tile]) -> SegmentationTarget:
        observed = torch.full((len(tiles),), self.mask is not None)
        if self.mask is None:
            return SegmentationTarget(torch.zeros(len(tiles), *self.patch, dtype=torch.int64), observed)
        return SegmentationTarget(torch.from_numpy(self._cut(self.mask, tiles)[:, 0].astype(np.int64)), observed)

    def _cut(self, voxels: Voxels, tiles: Sequence[Tile]) -> Voxels:
        out: NDArray[Any] = np.empty((len(tiles), len(voxels), *self.patch), dtype=voxels.dtype)
        for row, tile in enumerate(tiles):
            box = tuple(slice(first, first + side) for first, side in zip(tile.start, self.patch, strict=True))
            out[row] = voxels[:, *box]
        return out


def whole_volumes(release: Release, split: Split, *, overlap: int = 0, rank: int = 0, world: int = 1) -> Iterator[WholeVolume]:
    """Every study of a split that has the volume which was outlined, with a mask or without; of several ranks, each gets its own.

    One volume, and the one that is read ahead, is in memory. overlap: voxels that neighbouring tiles share at least, see `cover`.

    Raises:
        SpecError: the label of the release is no mask.
        DataError: a member or a volume that is damaged.
        UnreachableError: the store does not answer.
    """
    label = release.schema.label
    if not isinstance(label, SegmentationSpec):
        remedy = "Prepare the data with a label of kind segmentation."
        raise SpecError(explain(f"label {label.name}", expected="masks", found="another label", remedy=remedy))
    pointers = _Pointers(release, split, label)
    uids = pointers.reader.uids(np.arange(pointers.reader.num_samples, dtype=np.int64))
    sample_of = {uid: sample for sample, uid in enumerate(uids.tolist())}
    chosen = np.arange(len(uids)) % world == rank
    for row in SplitLoader(release, split, 1).studies(Portion(chosen=chosen)):
        found = pointers.of(sample_of[int(row.uid[0])])
        if (image := found.get(label.modality)) is None:
            continue
        mask = found.pop(label.name, None)
        alike = {name: one for name, one in found.items() if one.shape[1:] == image.shape[1:]}
        patch = pointers.image.delivered
        yield WholeVolume(
            row=row,
            tiles=cover(image.shape[1:], patch, overlap),
            patch=patch,
            volumes={name: read_whole(release.store, one) for name, one in alike.items()},
            mask=None if mask is None else read_whole(release.store, mask),
        )


class _Pointers:
    """The pointers of studies, straight from the tars: of a mask and of all volumes that are cut as the one that was outlined."""

    def __init__(self, release: Release, split: Split, label: SegmentationSpec) -> None:
        self.reader = ShardReader(release, split)
        self._label, self._names = label, release.schema.stored_names
        volumes = {spec.name: spec for spec in release.schema.stored if isinstance(spec, VolumeSpec)}
        self.image = volumes[label.modality]
        grid = (self.image.spacing_mm, self.image.delivered)
        self._specs = {name: spec for name, spec in volumes.items() if (spec.spacing_mm, spec.delivered) == grid}
        self._source = Source(self.reader, _Direct(self.reader), {}, CENTRE, is_local=False)

    def of(self, number: int) -> dict[str, VolumePointer]:
        """Those of a sample, by name, as far as it has them."""
        (found,) = self.reader.find(np.array([number], dtype=np.int64))
        if isinstance(found, DataError):
            raise found
        sample = Sample(self._source, number, 0, found)
        columns = {name: self._names.index(name) for name in self._specs}
        pointers = {
            name: self._opened(sample, found, column, self._specs[name])
            for name, column in columns.items()
            if found.table[column][OFFSET] != ABSENT
        }
        image, mask = pointers.get(self._label.modality), pointers.get(self._label.name)
        if image is not None and mask is not None:
            sample.decoded(found, columns[self._label.name], lambda: check_mask_grid(mask, image))
        return pointers

    def _opened(self, sample: Sample, found: Found, column: int, spec: VolumeSpec) -> VolumePointer:
        content = sample.read(found, column)
        return sample.decoded(found, column, lambda: open_pointer(content, spec))


@dataclass(frozen=True)
class _Direct:
    """Members read from the store, one request each."""

    reader: ShardReader

    def read(self, shard: int, offset: int, size: int) -> Bytes:
        store, path = self.reader.release.tar_location(self.reader.shards[shard])
        return store.read_range(path, offset, offset + size)

    def read_again(self, shard: int, offset: int, size: int) -> Bytes:
        return self.read(shard, offset, size)
