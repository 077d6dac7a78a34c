"""A batch while it is filled: arrays made once, into whose rows the threads decode."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draf_dist.data.arena import Arena
from draf_dist.data.decode import UndecodableError, series_shape
from draf_dist.data.shards import SampleMeta
from draf_dist.data.targets import MaskRows, TargetRows, target_rows
from draf_dist.data.volumes import delivered_shape
from draf_dist.schema.batch import Batch, ModalityInput, SeriesInput
from draf_dist.schema.label_text import read_label
from draf_dist.schema.modality import DataSchema, ImageSpec, VolumeSpec
from draf_dist.schema.study import StudyLabel


class Frame:
    """num_rows rows of a batch, all of them padding until they are filled.

    Padding (DESIGN 6.4) is zeros with the first modality marked present, weight 0 and uid -1. Rows may be filled by several
    threads at once, each row by one. images: uint8 (B, C, H, W), volumes: (B, C, D, H, W), both of unknown content until a row is
    filled, cleared or dropped. masks: the targets, where these are masks. Images lie channels last in memory, as JPEG decoders
    write them: turning each would be another pass over it in the decode thread.
    """

    def __init__(self, schema: DataSchema, num_rows: int, arena: Arena) -> None:
        shape = (num_rows, len(schema.modalities))
        self.schema, self.num_rows = schema, num_rows
        self.images: dict[str, NDArray[np.uint8]] = {}
        self.volumes: dict[str, NDArray[Any]] = {}
        self.values: dict[str, NDArray[np.float32]] = {}
        self.observed: dict[str, NDArray[np.bool_]] = {}
        self._tensors: dict[str, Tensor] = {}
        for spec in schema.modalities:
            if isinstance(spec, ImageSpec):
                self.images[spec.name], self._tensors[spec.name] = _images(spec, num_rows, arena)
            elif isinstance(spec, VolumeSpec):
                shape_of_row = delivered_shape(spec)
                self.volumes[spec.name], self._tensors[spec.name] = arena.take((num_rows, *shape_of_row), np.dtype(spec.dtype))
            else:
                self.values[spec.name] = np.zeros((num_rows, *series_shape(spec)), dtype=np.float32)
                self.observed[spec.name] = np.zeros((num_rows, *series_shape(spec)), dtype=np.bool_)
        self.present = np.zeros(shape, dtype=np.bool_)
        self.present[:, 0] = True
        self.severity = np.zeros(shape, dtype=np.float32)
        self.quality = np.zeros(shape, dtype=np.float32)
        self.quality_known = np.zeros(shape, dtype=np.bool_)
        mask = schema.mask
        self.masks = None if mask is None else MaskRows(mask, schema.num_outputs, num_rows, arena)
        self.targets: TargetRows = target_rows(schema.label, num_rows) if self.masks is None else self.masks
        self.site, self.epoch = (np.zeros(num_rows, dtype=np.int64) for _ in range(2))
        self.uid = np.full(num_rows, -1, dtype=np.int64)
        self.weight = np.zeros(num_rows, dtype=np.float32)

    def describe(self, row: int, meta: SampleMeta, epoch: int) -> None:
        """Fills what the study's JSON says.

        Raises:
            UndecodableError: a site or label that the schema doesn't have, or a quality outside [0, 1].
        """
        if meta.site not in self.schema.sites:
            raise UndecodableError("a site that is not in schema.json")
        try:
            label = read_label(self.schema.label, meta.label)
        except ValueError:
            raise UndecodableError("a label that is not in schema.json") from None
        self.describe_by_index(row, meta.uid, self.schema.sites.index(meta.site), label, epoch)
        for column, name in enumerate(self.schema.names if meta.quality else ()):
            if name in meta.quality:
                quality = meta.quality[name]
                if not 0 <= quality <= 1:
                    raise UndecodableError(f"a quality of {name} outside [0, 1]")
                self.quality[row, column], self.quality_known[row, column] = quality, True

    def describe_by_index(self, row: int, uid: int, site: int, label: StudyLabel, epoch: int) -> None:
        """The same for a study without a JSON; nothing is known of its quality."""
        self.targets.set(row, label)
        self.site[row] = site
        self.uid[row], self.epoch[row], self.weight[row] = uid, epoch, 1.0

    def clear(self, row: int, column: int) -> None:
        """An absent modality: zeros, so that memory that is used again shows nothing of an earlier batch."""
        name = self.schema.modalities[column].name
        for arrays in (self.images, self.volumes, self.values, self.observed):
            if name in arrays:
                arrays[name][row] = 0

    def drop(self, row: int) -> None:
        """Makes the row padding."""
        for column in range(len(self.schema.modalities)):
            self.clear(row, column)
        for array in (self.severity, self.quality, self.quality_known, self.site, self.epoch, self.weight):
            array[row] = 0
        self.targets.clear(row)
        self.present[row] = np.arange(self.present.shape[1]) == 0
        self.uid[row] = -1

    def batch(self) -> Batch:
        """The batch, which shares the memory of the frame."""
        return Batch(
            modalities=self.schema.names,
            inputs={spec.name: self._input(column) for column, spec in enumerate(self.schema.modalities)},
            present=torch.from_numpy(self.present),
            corrupted=torch.from_numpy(self.severity > 0),
            severity=torch.from_numpy(self.severity),
            quality=torch.from_numpy(self.quality),
            quality_known=torch.from_numpy(self.quality_known),
            target=self.targets.target(),
            site=torch.from_numpy(self.site),
            uid=torch.from_numpy(self.uid),
            epoch=torch.from_numpy(self.epoch),
            weight=torch.from_numpy(self.weight),
        )

    def _input(self, column: int) -> ModalityInput:
        spec = self.schema.modalities[column]
        if isinstance(spec, ImageSpec | VolumeSpec):
            return self._tensors[spec.name]
        # The grid of a release is fixed: all of its steps count wherever the modality is present.
        length = np.where(self.present[:, column], series_shape(spec)[0], 0).astype(np.int64)
        return SeriesInput(
            torch.from_numpy(self.values[spec.name]), torch.from_numpy(self.observed[spec.name]), torch.from_numpy(length)
        )


def _images(spec: ImageSpec, num_rows: int, arena: Arena) -> tuple[NDArray[np.uint8], Tensor]:
    """uint8 (B, C, H, W) that lies channels last."""
    if spec.channels == 1:
        # The same memory, in the strides that everybody expects: oneDNN has been seen to crash on others of a single channel.
        return arena.take((num_rows, 1, spec.height, spec.width), np.dtype(np.uint8))
    pixels, tensor = arena.take((num_rows, spec.height, spec.width, spec.channels), np.dtype(np.uint8))
    return pixels.transpose(0, 3, 1, 2), tensor.permute(0, 3, 1, 2)
