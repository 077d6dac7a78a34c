"""Arrays -> member bytes, the same bytes for the same array; the counterpart of data/decode.py."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from draf_dist.data.masks import fitted_mask
from draf_dist.data.shards import PNG_CHANNELS, extension
from draf_dist.data.volumes import Voxels
from draf_dist.data.volumes_fit import UnfitVolumeError, fitted
from draf_dist.data.volumes_write import encode_volume
from draf_dist.schema.label import SegmentationSpec
from draf_dist.schema.label_text import label_text
from draf_dist.schema.modality import DataSchema, ImageSpec, SeriesSpec, TableSpec, VolumeSpec
from draf_dist.schema.study import MaskLabel, RawVolume, Study

PNG_COMPRESSION = 6
MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class EncodedStudy:
    """A study as a shard holds it.

    members: what `extension` gives -> bytes. present: modalities, and the mask by the label's name. out_of_range:
    "<modality>.<variable>" -> values left out. objects: what lies beside the shards: path in the release's store -> bytes, in the
    order to write them.
    """

    members: Mapping[str, bytes]
    present: tuple[str, ...]
    out_of_range: Mapping[str, int]
    objects: Mapping[str, bytes] = field(default_factory=dict)


class UnfitError(Exception):
    """A study that does not fit the schema: reason is one of a few short words, detail says more. It goes to quarantine."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Bounds:
    """What is plausible, both ends included: float32 (F,), infinite where a variable has no bound. codes: places of codes."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    codes: NDArray[np.int64]


def bounds_of(spec: SeriesSpec | TableSpec) -> Bounds:
    """The bounds of a modality's variables, rounded as their values are, or a value on the bound would fall outside."""
    low = np.array([-np.inf if v.low is None else v.low for v in spec.variables], dtype=np.float32)
    high = np.array([np.inf if v.high is None else v.high for v in spec.variables], dtype=np.float32)
    return Bounds(low, high, np.flatnonzero([bool(v.categories) for v in spec.variables]))


def all_bounds(schema: DataSchema) -> dict[str, Bounds]:
    """By modality: with thousands of variables they take longer to put together than a study takes to encode."""
    return {spec.name: bounds_of(spec) for spec in schema.modalities if isinstance(spec, SeriesSpec | TableSpec)}


def encode_study(study: Study, schema: DataSchema, bounds: Mapping[str, Bounds] | None = None) -> EncodedStudy:
    """The members of a study, without its json. A modality of which nothing is observed is absent.

    bounds: those of the schema, for who encodes many studies.

    Raises:
        UnfitError: it does not fit the schema, or nothing of it is present.
    """
    _check_names(study, schema)
    bounds = all_bounds(schema) if bounds is None else bounds
    members: dict[str, bytes] = {}
    present: list[str] = []
    out_of_range: dict[str, int] = {}
    objects: dict[str, bytes] = {}
    for spec in schema.modalities:
        if isinstance(spec, VolumeSpec):
            if spec.name in study.volumes:
                members[extension(spec)], written = _encode_volume(study.volumes[spec.name], spec)
                objects |= written
                present.append(spec.name)
            continue
        if spec.name not in study.inputs:
            continue
        array = study.inputs[spec.name]
        if isinstance(spec, ImageSpec):
            stored: NDArray[np.uint8] | NDArray[np.float32] = resized(array, spec)
        else:
            stored, excluded = in_range(array, spec, bounds[spec.name])
            out_of_range |= {f"{spec.name}.{name}": count for name, count in excluded.items()}
            if np.isnan(stored).all():
                continue
        members[extension(spec)] = encode_array(stored, spec)
        present.append(spec.name)
    if not present:
        raise UnfitError("no input", "no modality with an observed value")
    if (mask := schema.mask) is not None and study.mask is not None:
        members[extension(mask)], written = _encode_mask(study, study.mask, mask, schema)
        objects |= written
        present.append(mask.name)
    return EncodedStudy(members, tuple(present), out_of_range, objects)


def _encode_volume(raw: RawVolume, spec: VolumeSpec) -> tuple[bytes, dict[str, bytes]]:
    """The member of a volume, and the objects that it points to."""
    return _written(lambda: fitted(raw, spec), spec)


def _encode_mask(study: Study, mask: RawVolume, spec: VolumeSpec, schema: DataSchema) -> tuple[bytes, dict[str, bytes]]:
    """The same of a mask, on the grid of its image."""
    assert isinstance(schema.label, SegmentationSpec)  # or there were no spec
    image, num_structures = study.volumes.get(schema.label.modality), schema.num_outputs
    if image is None:
        raise UnfitError("mask off its image", f"a mask without {schema.label.modality}, the volume that was outlined")
    return _written(lambda: fitted_mask(mask, image, spec, num_structures), spec)


def _written(fit: Callable[[], Voxels], spec: VolumeSpec) -> tuple[bytes, dict[str, bytes]]:
    try:
        pointer, objects = encode_volume(fit(), spec)
    except UnfitVolumeError as error:
        raise UnfitError(error.reason, error.detail) from error
    return pointer.model_dump_json().encode(), objects


def resized(array: NDArray[np.uint8] | NDArray[np.float32], spec: ImageSpec) -> NDArray[np.uint8]:
    """The image, uint8 (C, H, W), in the size of the schema: the mean over the area that a pixel covers, bilinear where it grows.

    Raises:
        UnfitError: it is no such image, or all its pixels are equal.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[0] != spec.channels or 0 in array.shape:
        raise UnfitError("bad shape", f"{spec.name}: expected uint8 ({spec.channels}, H, W), found {array.dtype} {array.shape}")
    pixels = array.astype(np.uint8, copy=False)
    if pixels.min() == pixels.max():
        raise UnfitError("blank image", f"{spec.name}: all pixels are {pixels.flat[0]}")
    if pixels.shape[1:] == (spec.height, spec.width):
        return pixels
    shrinks = pixels.shape[1] >= spec.height and pixels.shape[2] >= spec.width
    resampling = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    # In floating point: on uint8 Pillow rounds after each axis, and up.
    planes = [Image.fromarray(plane.astype(np.float32)).resize((spec.width, spec.height), resampling) for plane in pixels]
    return np.stack([np.rint(np.asarray(plane)).astype(np.uint8) for plane in planes])


def in_range(
    array: NDArray[np.uint8] | NDArray[np.float32], spec: SeriesSpec | TableSpec, bounds: Bounds | None = None
) -> tuple[NDArray[np.float32], dict[str, int]]:
    """The values, float32 (T, F), with NaN in place of what is implausible; and how many of each variable that were.

    Raises:
        UnfitError: they have another type or shape.
    """
    shape = (spec.num_steps if isinstance(spec, SeriesSpec) else 1, len(spec.variables))
    if array.dtype != np.float32 or array.shape != shape:
        raise UnfitError("bad shape", f"{spec.name}: expected float32 {shape}, found {array.dtype} {array.shape}")
    bounds = bounds_of(spec) if bounds is None else bounds
    excluded = (array < bounds.low) | (array > bounds.high) | np.isinf(array)
    codes = array[:, bounds.codes]
    excluded[:, bounds.codes] |= np.floor(codes) < codes
    number = excluded.sum(axis=0)
    counts = {spec.variables[i].name: int(number[i]) for i in np.flatnonzero(number)}
    return np.where(excluded, np.float32(np.nan), array.astype(np.float32, copy=False)), counts


def encode_array(array: NDArray[np.uint8] | NDArray[np.float32], spec: ImageSpec | SeriesSpec | TableSpec) -> bytes:
    """One member: PNG for grey and RGB images, npy for everything else."""
    buffer = io.BytesIO()
    if isinstance(spec, ImageSpec) and spec.channels in PNG_CHANNELS:
        pixels = array[0] if spec.channels == 1 else np.moveaxis(array, 0, -1)
        Image.fromarray(np.ascontiguousarray(pixels), MODES[spec.channels]).save(buffer, "PNG", compress_level=PNG_COMPRESSION)
    else:
        little = np.ascontiguousarray(array, dtype="|u1" if isinstance(spec, ImageSpec) else "<f4")
        np.lib.format.write_array(buffer, little, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _check_names(study: Study, schema: DataSchema) -> None:
    if study.site not in schema.sites:
        raise UnfitError("unknown site", f"expected one of {', '.join(schema.sites)}")
    try:
        label_text(schema.label, study.label)
    except ValueError as error:
        raise UnfitError("unknown label", str(error)) from None
    if isinstance(study.label, MaskLabel) and study.label.drawn != (study.mask is not None):
        raise UnfitError("unknown label", "a mask that the label does not speak of, or the other way round")
    if unknown := sorted({*study.inputs, *study.volumes} - set(schema.names)):
        raise UnfitError("unknown modality", f"{', '.join(unknown)} beside {', '.join(schema.names)}")
