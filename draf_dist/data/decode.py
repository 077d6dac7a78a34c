"""Member bytes -> arrays: an allow-list of decoders, each checked against the schema before anything is decoded.

A member can be hostile: a PNG of a few kilobytes may claim 60,000 x 60,000 pixels. So the header is compared with the schema
first, and what doesn't match is refused undecoded. Nothing here can run code: npy without pickle, JSON, PNG, JPEG.
"""

import io
import math
import struct
import zlib
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from draf_dist.data.npy import decode_npy, is_npy
from draf_dist.data.shards import SampleMeta, decode_meta
from draf_dist.schema.modality import ImageSpec, ModalitySpec, SeriesSpec, TableSpec, VolumeSpec

Bytes = bytes | memoryview

MAX_META_BYTES = 65_536
# The pointer to a volume lists the places of its chunks.
MAX_POINTER_BYTES = 2**21
# Room for the headers and for pixels that don't compress.
_SLACK_BYTES = 65_536
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_START = b"\xff\xd8\xff"
# Channels of the schema -> what a PNG calls it (colour type), what a JPEG decoder calls it.
_COLOURS = {1: (0, "GRAY"), 3: (2, "RGB")}


class UndecodableError(Exception):
    """A member that is not what the schema says; the reader adds release, shard and member and makes it a DataError."""


def max_member_bytes(spec: ModalitySpec) -> int:
    """The largest member of a modality that is read at all."""
    if isinstance(spec, VolumeSpec):
        return MAX_POINTER_BYTES
    if isinstance(spec, ImageSpec):
        return spec.channels * spec.height * spec.width + spec.height + _SLACK_BYTES
    return 4 * math.prod(series_shape(spec)) + _SLACK_BYTES


def series_shape(spec: SeriesSpec | TableSpec) -> tuple[int, int]:
    """(T, F); a table is a series of one step."""
    return (spec.num_steps if isinstance(spec, SeriesSpec) else 1, len(spec.variables))


def decode_image(data: Bytes, out: NDArray[np.uint8]) -> None:
    """Decodes a PNG, JPEG or npy image, told apart by their first bytes, into `out`, uint8 (C, H, W), all the schema allows.

    Raises:
        UndecodableError: another size, channel count or depth than that of `out`, damage, or a format outside the list.
    """
    start = bytes(data[:8])
    if start == _PNG_SIGNATURE:
        _decode_png(data, out)
    elif start.startswith(_JPEG_START):
        _decode_jpeg(data, out)
    elif is_npy(start):
        out[...] = _decode_npy(data, np.dtype(np.uint8), out.shape)
    else:
        raise UndecodableError("no PNG, JPEG or npy")


def decode_series(data: Bytes, out: NDArray[np.float32]) -> None:
    """Decodes an npy of float32 (T, F) into `out` of that shape; NaN means not observed.

    Raises:
        UndecodableError: another shape or type, an infinite value, or damage.
    """
    values = _decode_npy(data, np.dtype("<f4"), out.shape)
    if not np.isfinite(values).all() and np.isinf(values).any():
        raise UndecodableError("an infinite value, expected numbers or NaN")
    out[...] = values


def decode_study(data: Bytes) -> SampleMeta:
    """The study's JSON.

    Raises:
        UndecodableError: no JSON of the release format, or larger than MAX_META_BYTES.
    """
    if len(data) > MAX_META_BYTES:
        raise UndecodableError(f"{len(data)} bytes of JSON, expected at most {MAX_META_BYTES}")
    try:
        meta = decode_meta(bytes(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise UndecodableError(f"JSON that is no study ({type(error).__name__})") from error
    if not isinstance(meta.quality, dict) or not all(isinstance(quality, int | float) for quality in meta.quality.values()):
        raise UndecodableError("JSON that is no study (quality)")
    return meta


def _decode_png(data: Bytes, out: NDArray[np.uint8]) -> None:
    channels, height, width = out.shape
    if len(data) < 33:
        raise UndecodableError("a PNG without its header")
    found = struct.unpack(">IIBB", data[16:26])
    colour = _COLOURS[channels][0] if channels in _COLOURS else None
    if found != (width, height, 8, colour):
        raise UndecodableError(
            f"a PNG of {found[0]}x{found[1]} pixels, depth {found[2]}, colour type {found[3]}; "
            f"expected {width}x{height}, depth 8, colour type {colour}"
        )
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
        # Pillow reports damage in all of these ways.
        raise UndecodableError(f"a damaged PNG ({type(error).__name__})") from error
    out[...] = pixels if channels == 1 else pixels.transpose(2, 0, 1)


def _decode_jpeg(data: Bytes, out: NDArray[np.uint8]) -> None:
    channels, height, width = out.shape
    if channels not in _COLOURS:
        raise UndecodableError(f"a JPEG for {channels} channels, expected 1 or 3")
    pixels, colour = out.transpose(1, 2, 0), _COLOURS[channels][1]
    in_place = pixels.flags.c_contiguous
    try:
        # The decoder reads the header itself and refuses, undecoded, more pixels than the buffer holds.
        found = simplejpeg.decode_jpeg(data, colorspace=colour, buffer=pixels if in_place else np.empty(pixels.shape, np.uint8))
    except ValueError as error:
        raise _undecodable_jpeg(data, height, width) from error
    if found.shape != pixels.shape:
        raise _undecodable_jpeg(data, height, width)
    if not in_place:
        pixels[...] = found


def _undecodable_jpeg(data: Bytes, height: int, width: int) -> UndecodableError:
    try:
        found_height, found_width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return UndecodableError("a damaged JPEG")
    if (found_height, found_width) == (height, width):
        return UndecodableError("a damaged JPEG")
    return UndecodableError(f"a JPEG of {found_width}x{found_height} pixels, expected {width}x{height}")


def _decode_npy(data: Bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        found = decode_npy(data, dtype)
    except ValueError as error:
        raise UndecodableError(str(error)) from error
    if found.shape != shape:
        raise UndecodableError(f"an array of shape {found.shape}, expected {shape}")
    return found
