"""Statistics of the training split, from one pass, in float64: what normalisation subtracts and divides by."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.decode import Bytes, decode_image, decode_series, series_shape
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, TableSpec
from draf_dist.schema.release import ImageStats, ReleaseStats, VariableStats

Array = NDArray[np.uint8] | NDArray[np.float32]
Inputs = Mapping[str, Array]


class ImageMoments:
    """Pixel sums as whole numbers: exact, so the order of the images does not matter."""

    def __init__(self) -> None:
        self.num_images, self.num_pixels, self.total, self.total_squares = 0, 0, 0, 0

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """Counts one image, uint8 of any shape."""
        wide = pixels.astype(np.int64)
        self.num_images += 1
        self.num_pixels += wide.size
        self.total += int(wide.sum())
        self.total_squares += int((wide * wide).sum())

    def result(self) -> ImageStats:
        """Mean and population standard deviation, (0, 1) where there was no image, deviation 1 where all pixels are equal."""
        if not self.num_pixels:
            return ImageStats(mean=0.0, std=1.0, num_images=0)
        spread = self.num_pixels * self.total_squares - self.total**2
        std = float(np.sqrt(float(spread))) / self.num_pixels if spread else 1.0
        return ImageStats(mean=self.total / self.num_pixels, std=std, num_images=self.num_images)


class VariableMoments:
    """Running mean and sum of squared deviations per variable, merged sample by sample (Chan, Golub and LeVeque 1979).

    Stable where the deviation is small beside the mean; deterministic for a given order of samples.
    """

    def __init__(self, num_variables: int) -> None:
        self.count = np.zeros(num_variables, dtype=np.int64)
        self.mean = np.zeros(num_variables)
        self.squares = np.zeros(num_variables)

    def add(self, values: NDArray[np.float32]) -> None:
        """Counts the observed values of one sample, (T, F) with NaN where not observed."""
        wide = values.astype(np.float64)
        observed = ~np.isnan(wide)
        count = observed.sum(axis=0)
        divisor = np.maximum(count, 1)
        mean = np.where(observed, wide, 0.0).sum(axis=0) / divisor
        squares = (np.where(observed, wide - mean, 0.0) ** 2).sum(axis=0)
        total = np.maximum(self.count + count, 1)
        delta = mean - self.mean
        self.squares += np.where(count > 0, squares + delta**2 * (self.count * count / total), 0.0)
        self.mean += np.where(count > 0, delta * (count / total), 0.0)
        self.count += count

    def result(self, spec: SeriesSpec | TableSpec) -> tuple[VariableStats, ...]:
        """Mean and population standard deviation; (0, 1) for binary or never observed, deviation 1 where all values are equal."""
        return tuple(self._of(i, is_numeric=variable.type == "numeric") for i, variable in enumerate(spec.variables))

    def _of(self, i: int, *, is_numeric: bool) -> VariableStats:
        count = int(self.count[i])
        if not count or not is_numeric:
            return VariableStats(mean=0.0, std=1.0, num_observed=count)
        std = float(np.sqrt(self.squares[i] / count))
        return VariableStats(mean=float(self.mean[i]), std=std or 1.0, num_observed=count)


class StatsBuilder:
    """Takes the training samples one at a time and holds sums only."""

    def __init__(self, schema: DataSchema) -> None:
        self._schema = schema
        self._images = {spec.name: ImageMoments() for spec in schema.modalities if isinstance(spec, ImageSpec)}
        self._variables = {
            spec.name: VariableMoments(len(spec.variables)) for spec in schema.modalities if not isinstance(spec, ImageSpec)
        }

    def add(self, inputs: Inputs) -> None:
        """Counts the present modalities of one sample, as they are stored."""
        for name, array in inputs.items():
            if name in self._images:
                self._images[name].add(array.astype(np.uint8, copy=False))
            else:
                self._variables[name].add(array.astype(np.float32, copy=False))

    def result(self) -> ReleaseStats:
        """The statistics of what was added so far."""
        return ReleaseStats(
            images={name: moments.result() for name, moments in self._images.items()},
            variables={
                spec.name: self._variables[spec.name].result(spec)
                for spec in self._schema.modalities
                if not isinstance(spec, ImageSpec)
            },
        )


def decode_member(data: Bytes, spec: ModalitySpec) -> Array:
    """A modality as it is stored: uint8 (C, H, W), or float32 (T, F) with NaN where not observed.

    Raises:
        UndecodableError: it is not what the schema says.
    """
    if isinstance(spec, ImageSpec):
        pixels = np.empty((spec.channels, spec.height, spec.width), dtype=np.uint8)
        decode_image(data, pixels)
        return pixels
    values = np.empty(series_shape(spec), dtype=np.float32)
    decode_series(data, values)
    return values
