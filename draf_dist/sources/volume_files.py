"""3-D images of an export: a NIfTI file or a folder with the DICOM files of one series, turned to the patient's axes.

Sizes are bounded by the header before any voxel is read, and a compressed file is unpacked no further than its header says. What
can't be used is an ImageError, whose text holds no name of a file and nothing that a header says of a person.
"""

import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from draf_dist.schema.study import RawVolume
from draf_dist.sources import tables
from draf_dist.sources.card_model import VolumeCard
from draf_dist.sources.dicom_series import read_series, scaled
from draf_dist.sources.images import ImageError

MAX_FILE_BYTES = 4 * 2**30
MAX_VOXELS = 2**29
# NIfTI's header extensions lie between the header and the voxels.
MAX_OFFSET_BYTES = 2**20
_HEADERS: dict[int, type[nib.Nifti1Header]] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
# Cosine of the angle between two axes, as for DICOM: headers are rounded. Across 500 voxels it is a shift of half a voxel.
MAX_COSINE = 1e-3
_MILLIMETRES = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}


def load_volume(raw: Path, file: str, card: VolumeCard) -> tuple[RawVolume, str]:
    """The volume at a path relative to the raw folder, and a sha256 of the files that it came from.

    Raises:
        ImageError: it is not there, lies outside the raw folder, is too large, damaged, or not a volume that can be placed.
    """
    path = _inside(raw, file)
    with _told_without_names():
        if path.is_dir():
            return _load_dicom(path, card)
        if path.is_file():
            return _load_nifti(path, card.channels)
    raise ImageError("missing image", "there is no such file or folder")


def load_nifti(raw: Path, file: str) -> RawVolume | None:
    """The volume of one channel in a NIfTI file at a path relative to the raw folder; None where nothing is there.

    Raises:
        ImageError: it lies outside the raw folder, is too large, damaged, or not a volume that can be placed.
    """
    path = _inside(raw, file)
    with _told_without_names():
        if not path.exists():
            return None
        return _load_nifti(path, channels=1)[0]


def _inside(raw: Path, file: str) -> Path:
    path = tables.inside(raw, file)
    if path is None:
        raise ImageError("bad path", "the path leads out of the raw folder, or has a backslash or colon in it")
    return path


@contextmanager
def _told_without_names() -> Iterator[None]:
    """What the disk says, as an ImageError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # Their own text names the file. A loop of links is a RuntimeError.
        detail = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "it can't be read"
        raise ImageError("unreadable image", f"the disk says: {detail}") from error


def _load_dicom(path: Path, card: VolumeCard) -> tuple[RawVolume, str]:
    series = read_series(path, must_be_ct=card.unit == "HU")
    return canonical(series.voxels, series.affine), series.sha256


def _load_nifti(path: Path, channels: int) -> tuple[RawVolume, str]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ImageError("image too large", f"the file has more than {MAX_FILE_BYTES} bytes")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        expected = "expected a .nii or .nii.gz file, or a folder with the DICOM files of one series"
        raise ImageError("unknown format", f"{expected}; convert NRRD, MetaImage and others before export")
    try:
        with path.open("rb") as packed:
            is_gzip = path.name.lower().endswith(".gz")
            file = cast(IO[bytes], gzip.GzipFile(fileobj=packed)) if is_gzip else packed
            volume = read_nifti(file, channels=channels)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ImageError("broken image", "its compression is damaged, or it is cut short") from error
    with path.open("rb") as plain:
        return volume, hashlib.file_digest(plain, "sha256").hexdigest()


def read_nifti(file: IO[bytes], *, channels: int = 1) -> RawVolume:
    """A NIfTI-1 or -2 volume from an open file (unpacked already); values scaled as its header says.

    Raises:
        ImageError: it is none, has no orientation, is too large, or ends early.
    """
    header = _nifti_header(file)
    sides = _nifti_sides(header.get_data_shape(), channels)
    dtype = header.get_data_dtype()
    if dtype.names is not None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ImageError("unknown format", "expected voxels that are whole or floating-point numbers of at most 64 bits")
    offset, num_bytes = int(header["vox_offset"]), dtype.itemsize * math.prod(sides)
    start = int(header["sizeof_hdr"])
    if not start <= offset <= MAX_OFFSET_BYTES:
        raise ImageError("broken image", "its voxels begin at an impossible place")
    file.read(offset - start)
    content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise ImageError("broken image", f"{len(content)} bytes of voxels, its header says {num_bytes}")
    # At the end gzip compares its check sum.
    file.read(1)
    array = np.frombuffer(content, dtype=dtype).reshape(sides, order="F")
    slope, intercept = _nifti_scale(header)
    return canonical(scaled(array, slope, intercept), _nifti_affine(header))


def _nifti_header(file: IO[bytes]) -> nib.Nifti1Header:
    start = file.read(4)
    for size, kind in _HEADERS.items():
        for endianness in ("<", ">"):
            if start == np.array(size, f"{endianness}i4").tobytes():
                content = start + file.read(size - 4)
                if len(content) != size:
                    raise ImageError("broken image", "it ends within its header")
                header = kind(content, endianness, check=False)
                if bytes(header["magic"].tobytes())[:3] not in (b"n+1", b"n+2"):
                    raise ImageError("unknown format", "expected a NIfTI file that holds its own voxels (.nii)")
                return header
    raise ImageError("unknown format", "expected a NIfTI file")


def _nifti_sides(shape: Sequence[int], channels: int) -> tuple[int, int, int, int]:
    """(X, Y, Z, C)."""
    sides = [int(side) for side in shape]
    while len(sides) > 3 and sides[-1] == 1 and len(sides) + (channels == 1) > 4:
        sides.pop()
    x, y, z, c = [*sides, *([1] * (4 - len(sides)))] if len(sides) in (3, 4) else (0, 0, 0, 0)
    if min(x, y, z) < 1 or c != channels:
        found = " x ".join(str(side) for side in shape)
        raise ImageError("bad shape", f"{found} voxels, expected three axes and {channels} channel{'s' * (channels > 1)}")
    if x * y * z * c > MAX_VOXELS:
        raise ImageError("image too large", f"more than {MAX_VOXELS} voxels")
    return x, y, z, c


def _nifti_scale(header: nib.Nifti1Header) -> tuple[float, float]:
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise ImageError("broken image", "its scale is no number") from error
    return (1.0 if slope is None else float(slope)), (0.0 if intercept is None else float(intercept))


def _nifti_affine(header: nib.Nifti1Header) -> NDArray[np.float64]:
    """Voxel indices to RAS millimetres: the sform, or else the qform."""
    if not (int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0):
        raise ImageError("no orientation", "neither sform nor qform says how the patient lies")
    try:
        unit = header.get_xyzt_units()[0]
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, KeyError, ValueError) as error:
        raise ImageError("broken image", "its orientation or unit makes no sense") from error
    if unit not in _MILLIMETRES:
        raise ImageError("broken image", "its spacing is in no unit of length")
    return np.asarray(affine[:3] * _MILLIMETRES[unit])


def canonical(voxels: NDArray[np.int16] | NDArray[np.float32], affine: NDArray[np.float64]) -> RawVolume:
    """A volume (X, Y, Z, C) turned to (C, D, H, W): D grows towards the head, H towards the front, W towards the patient's right.

    affine: (3, 4), voxel indices (x, y, z, 1) to RAS millimetres. Axes are permuted and flipped, never interpolated: a volume that
    was taken obliquely keeps its own axes, each named after the nearest of the patient's.

    Raises:
        ImageError: a spacing that makes no sense, or axes that are not perpendicular.
    """
    axes = affine[:, :3]
    spacing = np.sqrt((axes**2).sum(axis=0))
    if not np.isfinite(axes).all() or (spacing < 1e-4).any() or (spacing > 1e3).any():
        raise ImageError("bad spacing", "the spacing of its voxels is zero, not a number, or beyond a metre")
    directions = axes / spacing
    cosine = float(np.abs(directions.T @ directions - np.eye(3)).max())
    if cosine > MAX_COSINE:
        angle = math.degrees(math.acos(min(cosine, 1.0)))
        raise ImageError("sheared axes", f"two of its axes meet at {angle:.1f} degrees; resample it before export")
    whole = np.concatenate([affine, [[0.0, 0.0, 0.0, 1.0]]])
    turns = nib.io_orientation(whole)
    turned = nib.apply_orientation(voxels, turns)
    x, y, z = (float(spacing[int(np.flatnonzero(turns[:, 0] == axis)[0])]) for axis in range(3))
    # Of (x, y, z) after the turn, then of (d, h, w).
    placed = (whole @ nib.orientations.inv_ornt_aff(turns, voxels.shape[:3]))[:3][:, [2, 1, 0, 3]]
    return RawVolume(np.ascontiguousarray(turned.transpose(3, 2, 1, 0)), (z, y, x), placed)
