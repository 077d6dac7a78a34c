"""3-D images made for tests: a phantom whose place in the patient is known, as voxels, NIfTI files and DICOM series."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from draf_dist.schema.modality import VolumeSpec

SPEC = VolumeSpec(name="ct", spacing_mm=(1, 1, 1), patch=(16, 24, 32), chunk=(8, 16, 16), unit="HU", fill=-1024)


def noise(shape: tuple[int, ...] = (1, 40, 50, 60), dtype: str = "int16", seed: int = 0) -> NDArray[np.int16]:
    """Air below, tissue above: chunks that are all fill, and chunks that are not."""
    voxels = (np.random.default_rng(seed).normal(size=shape) * 100).astype(dtype)
    voxels[:, :17] = -1024
    return voxels


def phantom(sides: tuple[int, int, int] = (5, 6, 7)) -> NDArray[np.int16]:
    """(X, Y, Z) in RAS: 100, +1 at the patient's right end, +2 at the front, +4 at the head: corners tell where they are."""
    voxels = np.full(sides, 100, dtype=np.int16)
    voxels[-1] += 1
    voxels[:, -1] += 2
    voxels[:, :, -1] += 4
    return voxels


def write_nifti(path: Path, voxels: NDArray[np.generic], affine: NDArray[np.float64], **header: float) -> Path:
    """A NIfTI file with an sform."""
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def write_dicom(folder: Path, ras: NDArray[np.int16], *, spacing: tuple[float, float, float], axes: str = "LP+S") -> list[Path]:
    """A CT series of an (X, Y, Z) RAS volume, one file a slice; returns the files in the order along the normal.

    axes: direction of columns (along a row), of rows, and of the slices, for example "LP+S" for a usual axial series.
    """
    columns, rows, slices = axes[0], axes[1], axes[3]
    turned = _along(_along(_along(ras, columns), rows), slices)
    order = [_axis(letter) for letter in (columns, rows, slices)]
    planes = turned.transpose(order)
    step = [spacing[axis] for axis in order]
    origin = np.array([_end(letter, ras.shape, spacing) for letter in (columns, rows, slices)]).sum(axis=0)
    directions = [_direction(letter) for letter in (columns, rows, slices)]
    folder.mkdir(parents=True, exist_ok=True)
    series, paths = generate_uid(), []
    for k in range(planes.shape[2]):
        ras_position = origin + directions[2] * step[2] * k
        position = np.array([-1, -1, 1]) * ras_position
        orientation = np.concatenate([np.array([-1, -1, 1]) * directions[0], np.array([-1, -1, 1]) * directions[1]])
        # Named and numbered so that neither gives the order away.
        path = folder / f"{(37 * k + 3) % 97:03d}.dcm"
        _slice(path, planes[:, :, k].T, position, orientation, step, series, number=1000 - (5 * k) % 31)
        paths.append(path)
    return paths


def change_dicom(path: Path, **changes: object) -> None:
    """Sets elements of a file."""
    data = pydicom.dcmread(path)
    for name, value in changes.items():
        setattr(data, name, value)
    data.save_as(path)


def _slice(
    path: Path,
    pixels: NDArray[np.int16],
    position: NDArray[np.float64],
    orientation: NDArray[np.float64],
    step: list[float],
    series: UID,
    *,
    number: int,
) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.2")
    meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = generate_uid(), ExplicitVRLittleEndian
    data = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientName, data.PatientID, data.Modality = "CANARY^NAME", "CANARY-7", "CT"
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.InstanceNumber = series, number
    data.ImagePositionPatient, data.ImageOrientationPatient = [float(v) for v in position], [float(v) for v in orientation]
    data.PixelSpacing = [step[1], step[0]]
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = (pixels.astype(np.int32) + 1024).astype("<u2").tobytes()
    data.save_as(path, enforce_file_format=True)


def _axis(letter: str) -> int:
    return next(axis for axis, pair in enumerate(("RL", "AP", "SI")) if letter in pair)


def _along(ras: NDArray[np.int16], letter: str) -> NDArray[np.int16]:
    return ras if letter in "RAS" else np.flip(ras, _axis(letter))


def _direction(letter: str) -> NDArray[np.float64]:
    return np.eye(3)[_axis(letter)] * (1 if letter in "RAS" else -1)


def _end(letter: str, sides: tuple[int, ...], spacing: tuple[float, float, float]) -> NDArray[np.float64]:
    axis = _axis(letter)
    return np.eye(3)[axis] * (0 if letter in "RAS" else spacing[axis] * (sides[axis] - 1))
