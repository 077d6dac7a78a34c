"""Statistics of the training split, from one pass, in float64: what normalisation subtracts and divides by."""

import math
from collections.abc import Mapping
from typing import overload

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.category_counts import CategoryCounts
from draf_dist.data.decode import Bytes, decode_image, decode_series, series_shape
from draf_dist.data.volumes import STEP, open_pointer
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, TableSpec, VolumeSpec
from draf_dist.schema.release import ImageStats, ImageSums, ReleaseStats, TrainingSums, VariableStats, VariableSums
from draf_dist.schema.volume import VolumePointer

Array = NDArray[np.uint8] | NDArray[np.float32]
# A volume is counted by the sums in its pointer.
Inputs = Mapping[str, Array | VolumePointer]


class ImageMoments:
    """Sums over pixels or voxels as whole numbers of `step`: exact, so the order of the images does not matter."""

    def __init__(self, start: ImageSums | None = None, step: float = 1.0) -> None:
        self._step = step
        self.num_images, self.num_pixels, self.total, self.total_squares = 0, 0, 0, 0
        if start is not None:
            self.num_images, self.num_pixels = start.num_images, start.num_pixels
            self.total, self.total_squares = start.total, start.total_squares

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """Counts one image, uint8 of any shape."""
        wide = pixels.astype(np.int64)
        self.num_images += 1
        self.num_pixels += wide.size
        self.total += int(wide.sum())
        self.total_squares += int((wide * wide).sum())

    def add_volume(self, pointer: VolumePointer) -> None:
        """Counts one volume by the sums that its pointer states."""
        self.num_images += 1
        self.num_pixels += math.prod(pointer.shape)
        self.total += pointer.total
        self.total_squares += pointer.total_squares

    def sums(self) -> ImageSums:
        """To go on from later."""
        return ImageSums(num_images=self.num_images, num_pixels=self.num_pixels, total=self.total, total_squares=self.total_squares)

    def result(self) -> ImageStats:
        """Mean and population standard deviation, (0, 1) where there was no image, deviation 1 where all pixels are equal."""
        if not self.num_pixels:
            return ImageStats(mean=0.0, std=1.0, num_images=0)
        spread = self.num_pixels * self.total_squares - self.total**2
        std = float(np.sqrt(float(spread))) / self.num_pixels * self._step if spread else 1.0
        return ImageStats(mean=self.total / self.num_pixels * self._step, std=std, num_images=self.num_images)


class VariableMoments:
    """Running mean and sum of squared deviations per variable, merged sample by sample (Chan, Golub and LeVeque 1979).

    Stable where the deviation is small beside the mean; deterministic for a given order of samples.
    """

    def __init__(self, num_variables: int, start: VariableSums | None = None) -> None:
        self.count = np.zeros(num_variables, dtype=np.int64)
        self.mean = np.zeros(num_variables)
        self.squares = np.zeros(num_variables)
        if start is not None:
            self.count[:], self.mean[:], self.squares[:] = start.count, start.mean, start.squares

    def add(self, values: NDArray[np.float32]) -> None:
        """Counts the observed values of one sample, (T, F) with NaN where not observed."""
        self.merge(moments_of(values))

    def merge(self, moments: NDArray[np.float64]) -> None:
        """Counts one sample by its moments, as `moments_of` gives them."""
        mean, squares = moments[1:]
        count = moments[0].astype(np.int64)
        total = np.maximum(self.count + count, 1)
        delta = mean - self.mean
        self.squares += np.where(count > 0, squares + delta**2 * (self.count * count / total), 0.0)
        self.mean += np.where(count > 0, delta * (count / total), 0.0)
        self.count += count

    def sums(self) -> VariableSums:
        """To go on from later, without a rounding: JSON gives every float64 back as it was."""
        return VariableSums(count=tuple(self.count.tolist()), mean=tuple(self.mean.tolist()), squares=tuple(self.squares.tolist()))

    def result(
        self, spec: SeriesSpec | TableSpec, categories: Mapping[int, tuple[int, ...]] | None = None
    ) -> tuple[VariableStats, ...]:
        """Mean and population standard deviation; (0, 1) unless numeric and observed, deviation 1 where all values are equal.

        categories: place of a categorical variable -> how often each category was observed.
        """
        return tuple(self._of(i, one.type == "numeric", (categories or {}).get(i, ())) for i, one in enumerate(spec.variables))

    def _of(self, i: int, is_numeric: bool, categories: tuple[int, ...]) -> VariableStats:
        count = int(self.count[i])
        if not count or not is_numeric:
            return VariableStats(mean=0.0, std=1.0, num_observed=count, categories=categories)
        std = float(np.sqrt(self.squares[i] / count))
        return VariableStats(mean=float(self.mean[i]), std=std or 1.0, num_observed=count)


def moments_of(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of one sample, (T, F), by variable: how many values are observed, their mean, the sum of their squared deviations: (3, F)."""
    wide = values.astype(np.float64)
    observed = ~np.isnan(wide)
    count = observed.sum(axis=0)
    mean = np.where(observed, wide, 0.0).sum(axis=0) / np.maximum(count, 1)
    squares = (np.where(observed, wide - mean, 0.0) ** 2).sum(axis=0)
    return np.stack([count.astype(np.float64), mean, squares])


class StatsBuilder:
    """Takes the training samples one at a time and holds sums only.

    start: the sums of samples that came before. Going on from them gives, bit for bit, what one pass over all gives.
    """

    def __init__(self, schema: DataSchema, start: TrainingSums | None = None) -> None:
        self._schema = schema
        images = {} if start is None else start.images
        variables = {} if start is None else start.variables
        self._images = {
            spec.name: ImageMoments(images.get(spec.name), STEP[spec.dtype] if isinstance(spec, VolumeSpec) else 1.0)
            for spec in schema.modalities
            if isinstance(spec, ImageSpec | VolumeSpec)
        }
        self._variables = {
            spec.name: VariableMoments(len(spec.variables), variables.get(spec.name))
            for spec in schema.modalities
            if isinstance(spec, SeriesSpec | TableSpec)
        }
        self._categories = {
            spec.name: CategoryCounts(spec, variables[spec.name].categories if spec.name in variables else ())
            for spec in schema.modalities
            if isinstance(spec, SeriesSpec | TableSpec)
        }

    def add(self, inputs: Inputs) -> None:
        """Counts the present modalities of one sample, as they are stored."""
        for name, array in inputs.items():
            if isinstance(array, VolumePointer):
                self._images[name].add_volume(array)
            elif name in self._images:
                self._images[name].add(array.astype(np.uint8, copy=False))
            else:
                values = array.astype(np.float32, copy=False)
                self._variables[name].add(values)
                self._categories[name].add(values)

    def sums(self) -> TrainingSums:
        """The sums of what was added so far, and of what came before."""
        return TrainingSums(
            images={name: moments.sums() for name, moments in self._images.items()},
            variables={
                name: moments.sums().model_copy(update={"categories": self._categories[name].sums()})
                for name, moments in self._variables.items()
            },
        )

    def result(self) -> ReleaseStats:
        """The statistics of what was added so far."""
        return ReleaseStats(
            images={name: moments.result() for name, moments in self._images.items()},
            variables={
                spec.name: self._variables[spec.name].result(spec, self._categories[spec.name].by_column())
                for spec in self._schema.modalities
                if isinstance(spec, SeriesSpec | TableSpec)
            },
        )


@overload
def decode_member(data: Bytes, spec: ImageSpec | SeriesSpec | TableSpec) -> Array: ...
@overload
def decode_member(data: Bytes, spec: VolumeSpec) -> VolumePointer: ...
def decode_member(data: Bytes, spec: ModalitySpec) -> Array | VolumePointer:
    """A modality as it is stored: uint8 (C, H, W), or float32 (T, F) with NaN where not observed; of a volume its pointer.

    Raises:
        UndecodableError: it is not what the schema says.
    """
    if isinstance(spec, VolumeSpec):
        return open_pointer(data, spec)
    if isinstance(spec, ImageSpec):
        pixels = np.empty((spec.channels, spec.height, spec.width), dtype=np.uint8)
        decode_image(data, pixels)
        return pixels
    values = np.empty(series_shape(spec), dtype=np.float32)
    decode_series(data, values)
    return values
