"""Fills frames: members are read, checked and decoded into the rows of a batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draf_dist.data.bad_data import BadDataDesk
from draf_dist.data.collate import Frame
from draf_dist.data.decode import decode_image, decode_series, decode_study
from draf_dist.data.local_shards import LocalShards, is_local
from draf_dist.data.patches import CENTRE, Patch, PatchRule
from draf_dist.data.sample import Members, Sample, Source
from draf_dist.data.shard_reader import Found, IntArray, ShardReader
from draf_dist.data.shards import ABSENT, OFFSET
from draf_dist.data.targets import MaskRows
from draf_dist.errors import DataError
from draf_dist.schema.label import SegmentationSpec
from draf_dist.schema.modality import ImageSpec, VolumeSpec

# Of volumes and masks, by row and column of the index.
Patches = Mapping[tuple[int, int], Patch]


class DecodeHook(Protocol):
    """Changes stored images in the decode thread. Must be a pure function of its arguments."""

    def levels(self, uid: Tensor, epoch: Tensor) -> dict[str, NDArray[np.int64]]:
        """Modality -> grid index of every sample (B,); 0 leaves the image as it is."""
        ...

    def change(self, image: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        """The image (C, H, W) at a grid index above 0."""
        ...

    def severity(self, index: int) -> float:
        """What Batch.severity says of a grid index, in (0, 1]."""
        ...


@dataclass(frozen=True)
class Rows:
    """What one local batch is made of: row i is sample[i] of release source[i], drawn in epoch[i]; the rest is padding."""

    step: int
    num_rows: int
    source: IntArray
    epoch: IntArray
    sample: IntArray


class Filler:
    """Fills frames with samples.

    readers: one a source. partners: modality -> for every sample the sample whose modality it gets (its own number: no change).
    """

    def __init__(
        self,
        readers: Sequence[ShardReader],
        hook: DecodeHook | None,
        desk: BadDataDesk,
        partners: Mapping[str, IntArray] | None = None,
        patch_rule: PatchRule = CENTRE,
    ) -> None:
        self.schema = readers[0].release.schema
        self.readers = readers
        # Kept from pass to pass, with the files that they have open.
        self.local = [LocalShards(reader) if is_local(reader) else None for reader in readers]
        self._hook, self._desk, self._patch_rule = hook, desk, patch_rule
        self._partners = {self.schema.names.index(name): samples for name, samples in (partners or {}).items()}
        self._volumes = [column for column, spec in enumerate(self.schema.modalities) if isinstance(spec, VolumeSpec)]
        self._mask = None if self.schema.mask is None else len(self.schema.modalities)

    @property
    def has_volumes(self) -> bool:
        """Whether samples have parts that lie outside of the tars."""
        return bool(self._volumes)

    def samples_read(self, samples: IntArray) -> IntArray:
        """The samples and those that they get a modality of, in whole rounds of the samples given."""
        return np.concatenate([samples, *(partners[samples] for partners in self._partners.values())])

    def sources(self, members: Sequence[Members]) -> list[Source]:
        """What `fill` and `patches` read with, given where the bytes of each release come from."""
        found = zip(self.readers, members, self.local, strict=True)
        return [Source(reader, one, self._partners, self._patch_rule, local is not None) for reader, one, local in found]

    def patches(self, rows: Rows, chunk: range, sources: Sequence[Source]) -> Patches:
        """Fetches the patches of a chunk's volumes, for `fill`; what is wrong with one is told there.

        Raises:
            UnreachableError: the store does not answer.
        """
        fetched: dict[tuple[int, int], Patch] = {}
        for row, sample in self._samples(rows, chunk, sources):
            if isinstance(sample, DataError):
                continue
            for column in self._volumes:
                with suppress(DataError):
                    if (patch := sample.patch(column)) is not None:
                        fetched[row, column] = patch
            if self._mask is not None:
                with suppress(DataError):
                    if (patch := sample.mask()) is not None:
                        fetched[row, self._mask] = patch
        return fetched

    def fill(self, frame: Frame, rows: Rows, chunk: range, sources: Sequence[Source], patches: Patches) -> None:
        """Decodes the samples of a chunk of rows into their rows of the frame. patches: fetched ones; others are fetched now.

        Raises:
            DataError: a member that is damaged or not what the schema says, if such may not be left out.
            UnreachableError: the store does not answer.
        """
        filling = _Filling(self._desk, frame, rows.step, patches)
        num_read = sum(filling.fill(row, sample) for row, sample in self._samples(rows, chunk, sources))
        self._desk.read(num_read, filling.num_lost, filling.local_bytes)
        if self._hook is not None:
            here = slice(chunk.start, chunk.stop)
            levels = self._hook.levels(torch.from_numpy(frame.uid[here]), torch.from_numpy(frame.epoch[here]))
            for name, indices in levels.items():
                _change(self._hook, frame, chunk, name, indices)

    def _samples(self, rows: Rows, chunk: range, sources: Sequence[Source]) -> Iterator[tuple[int, Sample | DataError]]:
        """The samples of a chunk, with their rows; an error in place of one whose shard can't be read."""
        source = rows.source[chunk.start : chunk.stop]
        for number in set(source.tolist()):
            here = chunk.start + np.flatnonzero(source == number)
            places = self.readers[number].find(rows.sample[here])
            located = zip(here.tolist(), rows.sample[here].tolist(), rows.epoch[here].tolist(), places, strict=True)
            for row, sample, epoch, place in located:
                yield row, Sample(sources[number], sample, epoch, place) if isinstance(place, Found) else place


class _Filling:
    """Samples on their way into the rows of a frame. What is left out leaves its row, or the part of it, empty.

    num_lost: rows of which nothing could be used. local_bytes: read from shards on a disk.
    """

    def __init__(self, desk: BadDataDesk, frame: Frame, step: int, patches: Patches) -> None:
        self.num_lost = self.local_bytes = 0
        self._desk, self._frame, self._step, self._patches = desk, frame, step, patches
        self._columns = range(len(frame.schema.modalities))

    def fill(self, row: int, sample: Sample | DataError) -> int:
        """Fills a row; the number of members that were read. A row of which nothing can be used becomes padding."""
        try:
            if isinstance(sample, DataError):
                raise sample
            self._describe(row, sample)
        except DataError as error:
            self._desk.leave_out(self._step, error)
            self._lose(row)
            return 1
        present = [self._modality(row, sample, column) for column in self._columns]
        if True not in present:
            self._lose(row)
        num_masks = 0 if self._frame.masks is None else self._mask(row, sample, self._frame.masks)
        return 1 + len(present) - present.count(None) + num_masks

    def _lose(self, row: int) -> None:
        self.num_lost += 1
        self._frame.drop(row)

    def _describe(self, row: int, sample: Sample) -> None:
        found, frame = sample.found, self._frame
        index, place = found.shard_index, found.place
        if index.sites is not None and index.labels is not None:
            frame.describe_by_index(row, sample.uid, int(index.sites[place]), int(index.labels[place]), sample.epoch)
            return
        column = len(found.table) - 1
        content = sample.read(found, column)
        if sample.source.is_local:
            self.local_bytes += len(content)
        meta = sample.decoded(found, column, lambda: decode_study(content))
        if meta.uid != sample.uid:
            raise sample.another_uid()
        sample.decoded(found, column, lambda: frame.describe(row, meta, sample.epoch))

    def _modality(self, row: int, sample: Sample, column: int) -> bool | None:
        """Decodes one modality, which may be that of another sample: whether it is there now; None where there is none to read."""
        frame = self._frame
        try:
            found, is_swapped = sample.place_of(column)
            if found.table[column][OFFSET] == ABSENT:
                frame.clear(row, column)
                frame.present[row, column] = False
                return None
            self._decode(row, sample, column, found)
        except DataError as error:
            self._desk.leave_out(self._step, error)
            frame.clear(row, column)
            frame.present[row, column] = frame.quality_known[row, column] = False
            frame.quality[row, column] = 0.0
            return False
        frame.present[row, column] = True
        if is_swapped:
            frame.severity[row, column] = 1.0
        return True

    def _mask(self, row: int, sample: Sample, masks: MaskRows) -> int:
        """Decodes the mask of a row that is said to have one: how many were read. It is hidden where its image was left out."""
        frame, column = self._frame, len(self._columns)
        label = frame.schema.label
        assert isinstance(label, SegmentationSpec)  # or there were no masks
        if not masks.observed[row]:
            return 0
        if not frame.present[row, frame.schema.names.index(label.modality)]:
            masks.clear(row)
            return 0
        try:
            patch = self._patches.get((row, column)) or sample.mask()
            if patch is None:
                raise sample.without_mask()
            if sample.source.is_local:
                self.local_bytes += patch.size_bytes
            sample.decoded(sample.found, column, lambda: masks.decode(row, patch))
        except DataError as error:
            self._desk.leave_out(self._step, error)
            masks.clear(row)
        return 1

    def _decode(self, row: int, sample: Sample, column: int, found: Found) -> None:
        frame = self._frame
        spec = frame.schema.modalities[column]
        if isinstance(spec, VolumeSpec):
            patch = self._patches.get((row, column)) or sample.patch(column)
            assert patch is not None  # there is a pointer, or _modality had returned
            if sample.source.is_local:
                self.local_bytes += patch.size_bytes
            sample.decoded(found, column, lambda: patch.decode(frame.volumes[spec.name][row]))
            return
        content = sample.read(found, column)
        if sample.source.is_local:
            self.local_bytes += len(content)
        if isinstance(spec, ImageSpec):
            sample.decoded(found, column, lambda: decode_image(content, frame.images[spec.name][row]))
            return
        values, observed = frame.values[spec.name][row], frame.observed[spec.name][row]
        sample.decoded(found, column, lambda: decode_series(content, values))
        np.logical_not(np.isnan(values), out=observed)
        values[~observed] = 0.0


def _change(hook: DecodeHook, frame: Frame, chunk: range, name: str, indices: NDArray[np.int64]) -> None:
    column = frame.schema.names.index(name)
    for row, index in zip(chunk, indices.tolist(), strict=True):
        # Padding has its first modality present, and nothing in it.
        if index > 0 and frame.present[row, column] and frame.uid[row] >= 0:
            frame.images[name][row] = hook.change(frame.images[name][row], index)
            frame.severity[row, column] = hook.severity(index)
