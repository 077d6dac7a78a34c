"""A batch while it is filled: arrays made once, into whose rows the threads decode."""

import numpy as np
import torch
from numpy.typing import NDArray

from draf_dist.data.decode import UndecodableError, series_shape
from draf_dist.data.shards import SampleMeta
from draf_dist.schema.batch import Batch, ClassTarget, ModalityInput, SeriesInput
from draf_dist.schema.modality import DataSchema, ImageSpec


class Frame:
    """num_rows rows of a batch, all of them padding until they are filled.

    Padding (DESIGN 6.4) is zeros with the first modality marked present, weight 0 and uid -1. Rows may be filled by several
    threads at once, each row by one.
    """

    def __init__(self, schema: DataSchema, num_rows: int) -> None:
        shape = (num_rows, len(schema.modalities))
        self.schema = schema
        self.images: dict[str, NDArray[np.uint8]] = {}
        self.values: dict[str, NDArray[np.float32]] = {}
        self.observed: dict[str, NDArray[np.bool_]] = {}
        for spec in schema.modalities:
            if isinstance(spec, ImageSpec):
                self.images[spec.name] = np.zeros((num_rows, spec.channels, spec.height, spec.width), dtype=np.uint8)
            else:
                self.values[spec.name] = np.zeros((num_rows, *series_shape(spec)), dtype=np.float32)
                self.observed[spec.name] = np.zeros((num_rows, *series_shape(spec)), dtype=np.bool_)
        self.present = np.zeros(shape, dtype=np.bool_)
        self.present[:, 0] = True
        self.severity = np.zeros(shape, dtype=np.float32)
        self.quality = np.zeros(shape, dtype=np.float32)
        self.quality_known = np.zeros(shape, dtype=np.bool_)
        self.label, self.site, self.epoch = (np.zeros(num_rows, dtype=np.int64) for _ in range(3))
        self.uid = np.full(num_rows, -1, dtype=np.int64)
        self.weight = np.zeros(num_rows, dtype=np.float32)

    def describe(self, row: int, meta: SampleMeta, epoch: int) -> None:
        """Fills what the study's JSON says.

        Raises:
            UndecodableError: a site or label that the schema doesn't have, or a quality outside [0, 1].
        """
        if meta.site not in self.schema.sites or meta.label not in self.schema.label.classes:
            raise UndecodableError("a site or label that is not in schema.json")
        self.site[row] = self.schema.sites.index(meta.site)
        self.label[row] = self.schema.label.classes.index(meta.label)
        self.uid[row], self.epoch[row], self.weight[row] = meta.uid, epoch, 1.0
        for column, name in enumerate(self.schema.names):
            if name in meta.quality:
                quality = meta.quality[name]
                if not 0 <= quality <= 1:
                    raise UndecodableError(f"a quality of {name} outside [0, 1]")
                self.quality[row, column], self.quality_known[row, column] = quality, True

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
            target=ClassTarget(torch.from_numpy(self.label), torch.from_numpy(self.weight > 0)),
            site=torch.from_numpy(self.site),
            uid=torch.from_numpy(self.uid),
            epoch=torch.from_numpy(self.epoch),
            weight=torch.from_numpy(self.weight),
        )

    def _input(self, column: int) -> ModalityInput:
        spec = self.schema.modalities[column]
        if isinstance(spec, ImageSpec):
            return torch.from_numpy(self.images[spec.name])
        # The grid of a release is fixed: all of its steps count wherever the modality is present.
        length = np.where(self.present[:, column], series_shape(spec)[0], 0).astype(np.int64)
        return SeriesInput(
            torch.from_numpy(self.values[spec.name]), torch.from_numpy(self.observed[spec.name]), torch.from_numpy(length)
        )
