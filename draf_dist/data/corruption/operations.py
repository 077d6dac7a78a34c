"""The operations of the corruption protocol (spec 0.4, with the EHR grid of findings 3): parameters first, then the same for all.

Every operation has a grid whose entry 0 leaves the input as it is; severity is grid index / last index. The noise of a sample
doesn't depend on the grid index, so a sweep sees one draw grow, not a new one at every step. All act on normalised inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import AfterValidator, Field
from torch import Tensor

from draf_dist import noise
from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.schema.batch import ModalityInput, SeriesInput
from draf_dist.schema.modality import ImageSpec, ModalitySpec, SeriesSpec, TableSpec


@dataclass(frozen=True)
class Scale:
    """A modality and the constants that standardised it: f32 scalars for an image, (F,) for a series or table.

    categories: place of a categorical variable -> how often each of its categories is observed in training.
    """

    spec: ModalitySpec
    mean: Tensor
    std: Tensor
    categories: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def _rises_from(identity: float) -> AfterValidator:
    def check(grid: tuple[float, ...]) -> tuple[float, ...]:
        if len(grid) < 2 or grid[0] != identity or len(set(grid)) != len(grid):
            raise ValueError(f"a grid starts with {identity:g} (unchanged) and goes on with other values, none twice")
        return grid

    return AfterValidator(check)


def _on_or_off(grid: tuple[float, ...]) -> tuple[float, ...]:
    if grid != (0, 1):
        raise ValueError("a sign is turned or not: the grid is [0, 1]")
    return grid


Sigmas = Annotated[tuple[Annotated[float, Field(ge=0)], ...], _rises_from(0)]
Probabilities = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], _rises_from(0)]
Factors = Annotated[tuple[Annotated[int, Field(ge=1)], ...], _rises_from(1)]
# Of units: finer and coarser ones.
Ratios = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], _rises_from(1)]
Switch = Annotated[tuple[float, ...], AfterValidator(_on_or_off)]
Qualities = Annotated[tuple[Annotated[int, Field(ge=0, le=100)], ...], _rises_from(0)]


class GaussianNoise(Spec):
    """x + sigma * eps on images, eps iid N(0, 1) for every pixel."""

    kind: Literal["gaussian"] = "gaussian"
    grid: Sigmas = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)

    def fits(self, spec: ModalitySpec) -> bool:
        """Images."""
        return isinstance(spec, ImageSpec)

    def apply(self, value: ModalityInput, index: Tensor, keys: Tensor, scale: Scale) -> ModalityInput:
        """Rows of one modality with the noise of their keys."""
        image = _image(value)
        sigma = _levels(self.grid, index)[:, None, None, None]
        return image + sigma * noise.normal(keys, tuple(image.shape[1:]))


class Downsample(Spec):
    """Images averaged over areas of factor x factor pixels, then interpolated bilinearly to the same grid."""

    kind: Literal["downsample"] = "downsample"
    grid: Factors = (1, 2, 4, 8)

    def fits(self, spec: ModalitySpec) -> bool:
        """Images."""
        return isinstance(spec, ImageSpec)

    def apply(self, value: ModalityInput, index: Tensor, keys: Tensor, scale: Scale) -> ModalityInput:
        """Rows of one modality at the resolution of their level; draws nothing."""
        image = _image(value)
        size = image.shape[-2:]
        result = image.clone()
        for level, factor in enumerate(self.grid):
            rows = torch.nonzero(index == level)[:, 0]
            if factor == 1 or rows.numel() == 0:
                continue
            small = F.interpolate(image[rows], size=[max(1, side // factor) for side in size], mode="area")
            result[rows] = F.interpolate(small, size=size, mode="bilinear", align_corners=False)
        return result


class Jpeg(Spec):
    """Images encoded as JPEG of some quality and decoded again, on the 8-bit grid they were stored on; 0 is not encoded.

    Training does this in the decode thread (`JpegHook`), a sweep here: standardisation is undone, so the pixels are the same.
    """

    kind: Literal["jpeg"] = "jpeg"
    grid: Qualities = (0, 90, 50, 30, 10)

    def fits(self, spec: ModalitySpec) -> bool:
        """Images."""
        return isinstance(spec, ImageSpec)

    def apply(self, value: ModalityInput, index: Tensor, keys: Tensor, scale: Scale) -> ModalityInput:
        """Rows of one modality through the codec at the quality of their level; draws nothing."""
        image = _image(value)
        pixels = (image * scale.std + scale.mean).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        coded = np.stack([self.encode(row, int(level)) for row, level in zip(pixels, index.tolist(), strict=True)])
        return ((torch.from_numpy(coded).to(image.device).float() - scale.mean) / scale.std).to(image.dtype)

    def encode(self, image: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        """One uint8 image (C, H, W) there and back; three channels as RGB with 4:2:0, any other number channel by channel."""
        if index == 0:
            return image
        quality = self.grid[index]
        if image.shape[0] == 3:
            rows = np.ascontiguousarray(image.transpose(1, 2, 0))
            data = simplejpeg.encode_jpeg(rows, quality=quality, colorspace="RGB", colorsubsampling="420")
            return np.ascontiguousarray(simplejpeg.decode_jpeg(data, colorspace="RGB").transpose(2, 0, 1))
        return np.stack([self._encode_channel(channel, quality) for channel in image])

    @staticmethod
    def _encode_channel(channel: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
        data = simplejpeg.encode_jpeg(
            np.ascontiguousarray(channel)[:, :, None], quality=quality, colorspace="GRAY", colorsubsampling="Gray"
        )
        coded: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="GRAY")[:, :, 0]
        return coded


class EhrMask(Spec):
    """Every (time, variable) is forgotten with probability p: the value becomes the imputation, 0, and is not observed."""

    kind: Literal["ehr_mask"] = "ehr_mask"
    grid: Probabilities = (0.0, 0.1, 0.3, 0.5)

    def fits(self, spec: ModalitySpec) -> bool:
        """Series and tables."""
        return isinstance(spec, SeriesSpec | TableSpec)

    def apply(self, value: ModalityInput, index: Tensor, keys: Tensor, scale: Scale) -> ModalityInput:
        """Rows of one modality with fewer observations."""
        series = _series(value)
        lost = noise.uniform(keys, tuple(series.values.shape[1:])) < _levels(self.grid, index)[:, None, None]
        observed = series.observed & ~lost
        return SeriesInput(torch.where(observed, series.values, 0.0), observed, series.length)


class EhrNoise(Spec):
    """x + sigma * eps on the observed standardised values; binary variables have no scale and are left alone.

    Codes have no scale either, but another code is as plausible: with probability 1 - 1 / sqrt(1 + sigma^2) an observed code is
    drawn again by how often each occurs in training. What is left of the correlation with the clean value is then the same as of a
    number, 1 / sqrt(1 + sigma^2) (ours).
    """

    kind: Literal["ehr_noise"] = "ehr_noise"
    grid: Sigmas = (0.0, 0.4, 0.8, 1.6, 3.2, 10.0)

    def fits(self, spec: ModalitySpec) -> bool:
        """Series and tables with at least one variable that is not binary."""
        return isinstance(spec, SeriesSpec | TableSpec) and any(variable.type != "binary" for variable in spec.variables)

    def apply(self, value: ModalityInput, index: Tensor, keys: Tensor, scale: Scale) -> ModalityInput:
        """Rows of one modality with the noise of their keys."""
        series = _series(value)
        sigma = _levels(self.grid, index)[:, None, None]
        noisy = series.values + sigma * noise.normal(keys, tuple(series.values.shape[1:]))
        values = torch.where(_numbers(series, scale), noisy, series.values)
        if scale.categories:
            values = _drawn_again(values, series.observed, 1 - (1 + sigma[..., 0].square()).rsqrt(), keys, scale.categories)
        return SeriesInput(values, series.observed, series.length)


class SignFlip(Spec):
    """-x for every observed standardised number of the modality: as far on the other side of the training mean.

    Binary variables and codes have no sign and are left alone. No distance from the training mean changes, so no novelty of the
    modality alone gives it away where its distribution is symmetric.
    """

    kind: Literal["sign_flip"] = "sign_flip"
    grid: Switch = (0.0, 1.0)

    def fits(self, spec: ModalitySpec) -> bool:
        """Series and tables with at least one number."""
        return has_numbers(spec)

    def apply(self, value: ModalityInput, index: Tensor, keys: Tensor, scale: Scale) -> ModalityInput:
        """Rows of one modality with the other sign where the level is 1; draws nothing."""
        series = _series(value)
        turned = (index > 0)[:, None, None] & _numbers(series, scale)
        return SeriesInput(torch.where(turned, -series.values, series.values), series.observed, series.length)


class UnitError(Spec):
    """All numbers of the modality in a unit `factor` times finer: the raw value times the factor, then standardised as ever.

    With z = (x - mean) / std this is (factor x - mean) / std = factor z + (factor - 1) mean / std. All numbers of the modality are
    hit: a feed in other units, and nothing is drawn. Ranges of plausible values that a card checks are not checked again here.
    """

    kind: Literal["unit_error"] = "unit_error"
    grid: Ratios = (1.0, 10.0)

    def fits(self, spec: ModalitySpec) -> bool:
        """Series and tables with at least one number; binary variables and codes have no unit and are left alone."""
        return has_numbers(spec)

    def apply(self, value: ModalityInput, index: Tensor, keys: Tensor, scale: Scale) -> ModalityInput:
        """Rows of one modality in the unit of their level; draws nothing."""
        series = _series(value)
        factor = _levels(self.grid, index)[:, None, None]
        wrong = factor * series.values + (factor - 1) * scale.mean / scale.std
        return SeriesInput(torch.where(_numbers(series, scale), wrong, series.values), series.observed, series.length)


class Swap(Spec):
    """A modality of another subject of the split in place of one's own: undetectable from the modality alone.

    For evaluation only. The partner is chosen over the whole split, so that a sample's partner does not depend on its batch;
    therefore it happens where samples are read (`CorruptedSplit`), not on a batch.
    """

    kind: Literal["swap"] = "swap"
    grid: Probabilities = (0.0, 1.0)


class Missing(Spec):
    """Every modality present goes missing with probability p, completely at random; at least one is kept (invariant I2).

    p is the probability of the draw; where a subject would lose everything, the rate that results is lower.
    """

    kind: Literal["missing"] = "missing"
    grid: Probabilities = (0.0, 0.1, 0.3, 0.5, 0.7)


class MissingNotAtRandom(Spec):
    """Every modality goes missing at a marginal rate, and more often in the sicker: logit P(missing) = a_m + slope * severity.

    score is what the severity is: the label, or the first principal score of series and tables. a_m is fitted to the split, so
    this needs all of it (`CorruptedSplit`).
    """

    kind: Literal["missing_not_at_random"] = "missing_not_at_random"
    grid: Probabilities = (0.0, 0.1, 0.3, 0.5, 0.7)
    slope: float = 1.0
    score: Literal["label", "ehr"] = "label"


# What changes one input and can be labelled: the corruption head learns to see these.
InputOperation = GaussianNoise | Downsample | Jpeg | EhrMask | EhrNoise | SignFlip | UnitError
# Everything a robustness sweep may apply. Adding an operation: its class above and its name here.
AnyOperation = InputOperation | Swap | Missing | MissingNotAtRandom
Operation = Annotated[AnyOperation, Field(discriminator="kind")]


def severity(operation: AnyOperation, index: int) -> float:
    """Grid index / last index, in [0, 1].

    Raises:
        SpecError: the grid has no such index.
    """
    last = len(operation.grid) - 1
    if not 0 <= index <= last:
        where = f"corruption {operation.kind}"
        raise SpecError(
            explain(where, expected=f"a grid index from 0 to {last}", found=str(index), remedy="Choose one of its grid.")
        )
    return index / last


def has_numbers(spec: ModalitySpec) -> bool:
    """Whether it is a series or table with at least one variable that is neither binary nor a code."""
    return isinstance(spec, SeriesSpec | TableSpec) and any(variable.type == "numeric" for variable in spec.variables)


def _numbers(series: SeriesInput, scale: Scale) -> Tensor:
    """Bool (B, T, F): observed values of numeric variables."""
    assert isinstance(scale.spec, SeriesSpec | TableSpec)
    numeric = torch.tensor([variable.type == "numeric" for variable in scale.spec.variables], device=series.values.device)
    return series.observed & numeric


def _drawn_again(
    values: Tensor, observed: Tensor, probability: Tensor, keys: Tensor, categories: Mapping[int, tuple[int, ...]]
) -> Tensor:
    """Values (B, T, F) whose observed codes are, with a probability (B, 1), drawn from the shares of the categories."""
    values = values.clone()
    draws = noise.uniform(keys, (values.shape[1], len(categories), 2))
    for number, (at, counts) in enumerate(categories.items()):
        reached = torch.tensor(counts, dtype=torch.float64, device=values.device).cumsum(0)
        code = torch.searchsorted((reached / reached[-1]).float(), draws[:, :, number, 1].contiguous(), right=True)
        hit = (draws[:, :, number, 0] < probability) & observed[..., at]
        values[..., at] = torch.where(hit, code.to(values.dtype), values[..., at])
    return values


def _levels(grid: tuple[float, ...], index: Tensor) -> Tensor:
    return torch.tensor(grid, dtype=torch.float32, device=index.device)[index]


def _image(value: ModalityInput) -> Tensor:
    if isinstance(value, SeriesInput):
        raise TypeError("this operation corrupts images, found a series")
    return value


def _series(value: ModalityInput) -> SeriesInput:
    if not isinstance(value, SeriesInput):
        raise TypeError("this operation corrupts series and tables, found an image")
    return value
