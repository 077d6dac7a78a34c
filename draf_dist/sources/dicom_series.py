"""A folder with the DICOM files of one series -> voxels in the order in which they lie in the patient.

Slices are sorted by where their planes cut the series' normal, never by file name or instance number: exporters number them as
they like. What would make that order a guess (a gap, a duplicate, two series, a tilted gantry) is refused. Nothing of a header
but numbers of geometry gets into a message.
"""

import hashlib
import logging
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid as syntax
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels.utils import pixel_array

from draf_dist.sources.images import ImageError

MAX_SLICES = 4096
MAX_SLICE_BYTES = 64 * 2**20
MAX_SIDE = 4096
MAX_VOXELS = 2**29
# Files that lie beside a series and are none of it.
_NO_SLICES = ("DICOMDIR", "Thumbs.db", "desktop.ini")
_PLAIN = (syntax.ImplicitVRLittleEndian, syntax.ExplicitVRLittleEndian, syntax.ExplicitVRBigEndian)
_JPEG_2000 = (syntax.JPEG2000Lossless, syntax.JPEG2000)
_MULTI_FRAME = (
    syntax.EnhancedCTImageStorage, syntax.LegacyConvertedEnhancedCTImageStorage,
    syntax.EnhancedMRImageStorage, syntax.LegacyConvertedEnhancedMRImageStorage, syntax.EnhancedMRColorImageStorage,
    syntax.EnhancedPETImageStorage, syntax.LegacyConvertedEnhancedPETImageStorage,
)  # fmt: skip
# Not the deflated one: pydicom unpacks it without a limit.
READABLE = (*_PLAIN, syntax.RLELossless, *_JPEG_2000)
_HEADER = [
    "Modality", "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept",
]  # fmt: skip
# How pydicom and its decoders report damage.
_DAMAGE = (
    AttributeError, EOFError, IndexError, InvalidDicomError, KeyError, NotImplementedError, OverflowError, RecursionError,
    RuntimeError, TypeError, UnicodeError, ValueError, struct.error,
)  # fmt: skip
# Millimetres: headers are rounded to a hundredth or so.
ROUNDING_MM = 0.011
UNEVEN = 0.02
TILT_MM = 0.1


@dataclass(frozen=True)
class Series:
    """voxels: (X, Y, Z, 1), columns first. affine: (3, 4), indices to RAS millimetres. sha256: of the files, in any order."""

    voxels: NDArray[np.int16] | NDArray[np.float32]
    affine: NDArray[np.float64]
    sha256: str


@dataclass(frozen=True)
class _Slice:
    path: Path
    series: str
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    sides: tuple[int, int]
    slope: float
    intercept: float


def read_series(folder: Path, *, must_be_ct: bool) -> Series:
    """The series in a folder; values after rescaling (HU for CT).

    Raises:
        ImageError: a file that is no slice of one CT, MR or PET series, or slices that do not follow one another evenly.
    """
    with _silent():
        slices = [_read_header(path, must_be_ct=must_be_ct) for path in _files(folder)]
        _check_same(slices)
        order, normal, step = _in_order(slices)
        rows, columns = slices[0].sides
        if rows * columns * len(slices) > MAX_VOXELS:
            raise ImageError("image too large", f"more than {MAX_VOXELS} voxels")
        planes = [_read_plane(slices[i]) for i in order]
    across, down = np.array(slices[0].orientation).reshape(2, 3)
    first = np.array(slices[order[0]].position)
    lps = np.stack([across * slices[0].spacing[1], down * slices[0].spacing[0], normal * step, first], axis=1)
    digests = sorted(hashlib.sha256(one.path.read_bytes()).hexdigest() for one in slices)
    voxels: NDArray[Any] = np.stack([plane.T for plane in planes], axis=2)
    return Series(voxels[..., None], np.diag([-1.0, -1.0, 1.0]) @ lps, hashlib.sha256("".join(digests).encode()).hexdigest())


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in _NO_SLICES)
    if not found:
        raise ImageError("missing image", "the folder is empty")
    if len(found) > MAX_SLICES:
        raise ImageError("image too large", f"more than {MAX_SLICES} files in the folder")
    if any(path.is_symlink() or not path.is_file() for path in found):
        raise ImageError("bad path", "a link or a folder among the DICOM files")
    if any(path.stat().st_size > MAX_SLICE_BYTES for path in found):
        raise ImageError("image too large", f"a file of more than {MAX_SLICE_BYTES} bytes")
    return found


def _read_header(path: Path, *, must_be_ct: bool) -> _Slice:
    try:
        _check_kind(path)
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_HEADER))
        if int(header.get("NumberOfFrames") or 1) != 1:
            raise _multi_frame()
        if header.get("SamplesPerPixel", 1) != 1 or header.get("PhotometricInterpretation") != "MONOCHROME2":
            raise ImageError("unknown format", "expected grey values (MONOCHROME2)")
        if must_be_ct and header.get("Modality") != "CT":
            raise ImageError("not in HU", "the card says HU, but the series is no CT")
        lacking = [name for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing") if not header.get(name)]
        if lacking:
            raise ImageError("no orientation", f"a slice without {', '.join(lacking)}")
        found = _Slice(
            path=path,
            series=str(header.get("SeriesInstanceUID", "")),
            position=tuple(float(value) for value in header.ImagePositionPatient),
            orientation=tuple(float(value) for value in header.ImageOrientationPatient),
            spacing=tuple(float(value) for value in header.PixelSpacing),
            sides=(int(header.Rows), int(header.Columns)),
            slope=float(header.get("RescaleSlope", 1.0)),
            intercept=float(header.get("RescaleIntercept", 0.0)),
        )
    except _DAMAGE as error:
        raise ImageError("broken image", "a file whose DICOM header can't be read") from error
    _check_numbers(found)
    return found


def _check_kind(path: Path) -> None:
    meta = pydicom.filereader.read_file_meta_info(path)
    # Also of a single frame: it says elsewhere where it lies.
    if meta.get("MediaStorageSOPClassUID") in _MULTI_FRAME:
        raise _multi_frame()
    if meta.TransferSyntaxUID not in READABLE:
        found = meta.TransferSyntaxUID.name if meta.TransferSyntaxUID.is_transfer_syntax else "an unknown one"
        expected = ", ".join(uid.name for uid in READABLE)
        raise ImageError("unknown format", f"transfer syntax {found}; readable are {expected}")


def _multi_frame() -> ImageError:
    return ImageError("multi-frame DICOM", "expected one slice a file; export the series as single frames, or convert it to NIfTI")


def _check_numbers(found: _Slice) -> None:
    numbers = (*found.position, *found.orientation, *found.spacing, found.slope, found.intercept)
    if (len(found.position), len(found.orientation), len(found.spacing)) != (3, 6, 2) or not np.isfinite(numbers).all():
        raise ImageError("broken image", "a position, orientation or spacing that is no set of numbers")
    if not all(1 <= side <= MAX_SIDE for side in found.sides):
        raise ImageError("image too large", f"a slice of more than {MAX_SIDE} pixels a side, or of none")
    axes = np.array(found.orientation).reshape(2, 3)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-3):
        raise ImageError("bad orientation", "its axes are not perpendicular or not of length 1")


def _check_same(slices: Sequence[_Slice]) -> None:
    first = slices[0]
    for one in slices[1:]:
        if one.series != first.series:
            raise ImageError("mixed series", "files of several series in one folder")
        if one.sides != first.sides or not np.allclose(one.orientation, first.orientation, atol=1e-3):
            raise ImageError("mixed series", "slices of several sizes or orientations in one folder (a scout image?)")
        if not np.allclose(one.spacing, first.spacing, rtol=1e-3):
            raise ImageError("mixed series", "slices of several pixel spacings in one folder")


def _in_order(slices: Sequence[_Slice]) -> tuple[list[int], NDArray[np.float64], float]:
    """Indices in the order of the planes, the unit normal, and the distance of neighbours in mm."""
    if len(slices) < 2:
        raise ImageError("one slice", "a volume needs at least two slices")
    across, down = np.array(slices[0].orientation).reshape(2, 3)
    normal = np.cross(across, down)
    positions = np.array([one.position for one in slices])
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    if (steps < ROUNDING_MM).any():
        raise ImageError("duplicate slice", f"{int((steps < ROUNDING_MM).sum())} slices at the place of another")
    usual = float(np.median(steps))
    off = np.abs(steps - usual) > max(UNEVEN * usual, ROUNDING_MM)
    if off.any():
        missing = int(np.rint(steps[steps > 1.5 * usual] / usual - 1).sum())
        what = f"{missing} slices are missing" if missing else "the distances of the slices differ"
        found = f"{what}: {steps.min():.2f} to {steps.max():.2f} mm, most {usual:.2f} mm"
        raise ImageError("missing slice" if missing else "uneven slices", found)
    beside = positions - np.outer(heights, normal)
    if np.abs(beside - beside[0]).max() > TILT_MM:
        raise ImageError("tilted gantry", "the slices are shifted against one another; resample the series before export")
    return order.tolist(), normal, float(steps.mean())


def _read_plane(one: _Slice) -> NDArray[np.int16] | NDArray[np.float32]:
    """(rows, columns), rescaled."""
    try:
        data = pydicom.dcmread(one.path)
        if data.file_meta.TransferSyntaxUID in _JPEG_2000:
            _check_codestream(get_frame(data.PixelData, 0, number_of_frames=1), one)
        pixels = pixel_array(data)
    except _DAMAGE as error:
        raise ImageError("broken image", "a slice whose pixels can't be decoded") from error
    except MemoryError as error:
        raise ImageError("image too large", "a slice that does not fit into memory") from error
    if pixels.shape != one.sides or pixels.dtype.kind not in "iu":
        raise ImageError("broken image", "a slice of another size than its header says")
    return scaled(pixels, one.slope, one.intercept)


def _check_codestream(frame: bytes, one: _Slice) -> None:
    """The size that a JPEG 2000 image claims, before it is decoded (ISO 15444-1, A.5.1: SIZ)."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 1024)
    if start < 0 or len(frame) < start + 24:
        raise ImageError("broken image", "a slice that is no JPEG 2000 image")
    width, height, left, top = struct.unpack(">4I", frame[start + 8 : start + 24])
    if (height - top, width - left) != one.sides:
        raise ImageError("broken image", "a slice of another size than its header says")


def scaled(array: NDArray[np.generic], slope: float, intercept: float) -> NDArray[np.int16] | NDArray[np.float32]:
    """Array * slope + intercept: int16 where the values are whole and fit, else float32."""
    if array.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer() and array.dtype.itemsize <= 4:
        ends = [int(end) * int(slope) + int(intercept) for end in (array.min(), array.max())]
        if min(ends) >= -32768 and max(ends) <= 32767:
            return (array.astype(np.int64) * int(slope) + int(intercept)).astype(np.int16)
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


@contextmanager
def _silent() -> Iterator[None]:
    """Pydicom's warnings quote the values of headers, and those may name the patient."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "pylibjpeg", "openjpeg")]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was
