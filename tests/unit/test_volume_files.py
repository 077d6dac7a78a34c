"""NIfTI files and DICOM series: every voxel ends where it is in the patient, and what can't be placed is refused."""

import gzip
import itertools
import logging
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.uid import DeflatedExplicitVRLittleEndian, EnhancedCTImageStorage, JPEGBaseline8Bit, generate_uid
from volume_inputs import change_dicom, phantom, write_dicom, write_nifti

from draf_dist.schema.study import RawVolume
from draf_dist.sources.card_volume import VolumeCard
from draf_dist.sources.images import ImageError
from draf_dist.sources.volume_files import load_volume

CARD = VolumeCard(name="ct", table="t", file="f", path="{file}", spacing_mm=(1, 1, 1), patch=(8, 8, 8))
HU = CARD.model_copy(update={"unit": "HU"})
SPACING = (0.7, 0.9, 2.5)
ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(["RL", "AP", "SI"])
    for letters in itertools.product(*axes)
]  # fmt: skip


def read(path: Path, card: VolumeCard = CARD) -> RawVolume:
    return load_volume(path.parent, path.name, card)[0]


def refused(path: Path, card: VolumeCard = CARD) -> ImageError:
    with pytest.raises(ImageError) as error:
        read(path, card)
    assert "CANARY" not in str(error.value)
    assert path.name not in str(error.value)
    return error.value


def as_stored(ras: NDArray[np.int16]) -> NDArray[np.int16]:
    """(X, Y, Z) in RAS as (C, D, H, W): head, front, right."""
    return ras.transpose(2, 1, 0)[None]


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_a_nifti_of_any_orientation_is_turned_to_the_patient(axes: str, tmp_path: Path) -> None:
    ras = phantom()
    image = nib.Nifti1Image(ras, np.diag([*SPACING, 1.0]))
    turned = image.as_reoriented(nib.io_orientation(np.eye(4)) if axes == "RAS" else _to(axes))
    path = write_nifti(tmp_path / "v.nii", np.asarray(turned.dataobj), turned.affine)
    assert nib.aff2axcodes(nib.load(path).affine) == tuple(axes)
    volume = read(path)
    assert np.array_equal(volume.voxels, as_stored(ras))
    assert volume.spacing_mm == pytest.approx((2.5, 0.9, 0.7))


def _to(axes: str) -> NDArray[np.float64]:
    start = nib.orientations.axcodes2ornt(("R", "A", "S"))
    return np.asarray(nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(tuple(axes))))


@pytest.mark.parametrize("axes", ["LP+S", "LP+I", "RA+S", "LS+A", "RI+P", "PI+R", "AS+L"])
def test_a_dicom_series_of_any_direction_is_turned_to_the_patient(axes: str, tmp_path: Path) -> None:
    ras = phantom()
    write_dicom(tmp_path / "series", ras, spacing=SPACING, axes=axes)
    volume = read(tmp_path / "series", HU)
    assert volume.voxels.dtype == np.int16
    assert np.array_equal(volume.voxels, as_stored(ras))
    assert volume.spacing_mm == pytest.approx((2.5, 0.9, 0.7))


def test_an_oblique_volume_keeps_its_own_axes(tmp_path: Path) -> None:
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(SPACING)
    volume = read(write_nifti(tmp_path / "v.nii", phantom(), affine))
    assert np.array_equal(volume.voxels, as_stored(phantom()))
    assert volume.spacing_mm == pytest.approx((2.5, 0.9, 0.7), rel=1e-5)


def sheared(degrees: float) -> NDArray[np.float64]:
    """An affine whose slices are shifted against one another, as by a tilted gantry."""
    affine = np.diag([*SPACING, 1.0])
    affine[1, 2] = np.tan(np.deg2rad(degrees)) * SPACING[2]
    return affine


@pytest.mark.parametrize(("degrees", "angle"), [(0.1, "89.9"), (15, "75.0"), (-30, "60.0"), (50, "40.0")])
def test_a_nifti_whose_axes_are_sheared_is_refused_like_a_tilted_series(tmp_path: Path, degrees: float, angle: str) -> None:
    error = refused(write_nifti(tmp_path / "v.nii", phantom(), sheared(degrees)))
    assert error.reason == "sheared axes"
    assert f"meet at {angle} degrees" in error.detail


def test_axes_that_are_only_rounded_are_taken_for_straight(tmp_path: Path) -> None:
    assert np.array_equal(read(write_nifti(tmp_path / "v.nii", phantom(), sheared(0.05))).voxels, as_stored(phantom()))


def test_scale_and_unit_of_a_nifti_count(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "v.nii", phantom(), np.diag([2, 2, 2, 1.0]), scl_slope=0.5, scl_inter=-3)
    data = bytearray(path.read_bytes())
    data[112:120], data[123] = struct.pack("<ff", 0.5, -3), 3  # microns; nibabel writes its own scale
    path.write_bytes(data)
    volume = read(path)
    assert np.array_equal(volume.voxels, as_stored(phantom()).astype(np.float32) * np.float32(0.5) - 3)
    assert volume.spacing_mm == pytest.approx((0.002, 0.002, 0.002))


def test_a_big_endian_nifti_2_is_read(tmp_path: Path) -> None:
    image = nib.Nifti2Image(phantom().astype(">i2"), np.eye(4), nib.Nifti2Header(endianness=">"))
    nib.save(image, tmp_path / "v.nii.gz")
    assert np.array_equal(read(tmp_path / "v.nii.gz").voxels, as_stored(phantom()))


def test_channels_of_a_nifti_come_first(tmp_path: Path) -> None:
    two = np.stack([phantom(), phantom() + 50], axis=-1)
    path = write_nifti(tmp_path / "v.nii", two, np.eye(4))
    volume = read(path, CARD.model_copy(update={"channels": 2}))
    assert np.array_equal(volume.voxels[1], as_stored(phantom() + 50)[0])
    assert refused(path).reason == "bad shape"


Damage = Callable[[bytearray], bytes | bytearray]


def put(place: int, layout: str, *values: float) -> Damage:
    def change(data: bytearray) -> bytearray:
        data[place : place + struct.calcsize(layout)] = struct.pack(layout, *values)
        return data

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put(42, "<hhh", 32000, 32000, 32000), "image too large"),
        (put(108, "<f", 2e9), "broken image"),
        (put(252, "<hh", 0, 0), "no orientation"),
        (put(280, "<ffff", 0, 0, 0, 0), "bad spacing"),
        (put(70, "<h", 128), "unknown format"),
        (put(344, "<4s", b"ni1\0"), "unknown format"),
        (lambda data: data[: len(data) // 2], "broken image"),
        (lambda data: data[:200], "broken image"),
        (lambda data: b"no NIfTI at all", "unknown format"),
    ],
    ids=["huge", "far offset", "no orientation", "flat", "colour", "two files", "cut", "cut header", "text"],
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_nifti_that_can_not_be_used_is_refused(tmp_path: Path, suffix: str, change: Damage, reason: str) -> None:
    content = bytes(change(bytearray(write_nifti(tmp_path / "v.nii", phantom(), np.eye(4)).read_bytes())))
    path = tmp_path / f"CANARY{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert refused(path).reason == reason


def test_a_gzip_bomb_is_unpacked_no_further_than_its_header_says(tmp_path: Path) -> None:
    content = write_nifti(tmp_path / "v.nii", phantom(), np.eye(4)).read_bytes()
    with gzip.open(tmp_path / "bomb.nii.gz", "wb", compresslevel=1) as file:
        file.write(content)
        for _ in range(64):
            file.write(b"\0" * 2**20)
    assert np.array_equal(read(tmp_path / "bomb.nii.gz").voxels, as_stored(phantom()))


def test_a_gzip_file_that_was_cut_or_changed_is_refused(tmp_path: Path) -> None:
    content = gzip.compress(write_nifti(tmp_path / "v.nii", phantom(), np.eye(4)).read_bytes())
    flipped = bytearray(content)
    flipped[-6] ^= 1
    for data in (content[: len(content) // 2], bytes(flipped)):
        (tmp_path / "c.nii.gz").write_bytes(data)
        assert refused(tmp_path / "c.nii.gz").reason == "broken image"


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    return write_dicom(tmp_path / "CANARY", phantom((6, 7, 9)), spacing=SPACING)


def test_slices_are_sorted_by_place_and_a_missing_one_is_told(series: list[Path]) -> None:
    assert [path.name for path in series] != sorted(path.name for path in series)
    series[4].unlink()
    error = refused(series[0].parent, HU)
    assert error.reason == "missing slice"
    assert "1 slices are missing: 2.50 to 5.00 mm" in error.detail


def _second_series(paths: list[Path]) -> None:
    change_dicom(paths[2], SeriesInstanceUID=generate_uid())


def _twice(paths: list[Path]) -> None:
    (paths[0].parent / "again.dcm").write_bytes(paths[3].read_bytes())


def _tilted(paths: list[Path]) -> None:
    for k, path in enumerate(paths):
        change_dicom(path, ImagePositionPatient=[0.0, 0.4 * k, 2.5 * k])


def _uneven(paths: list[Path]) -> None:
    change_dicom(paths[-1], ImagePositionPatient=[-3.5, -5.4, 2.5 * 8 + 0.9])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_second_series, "mixed series"),
        (_twice, "duplicate slice"),
        (_tilted, "tilted gantry"),
        (_uneven, "uneven slices"),
        (lambda paths: change_dicom(paths[1], Rows=3, PixelData=b"\0" * 36), "mixed series"),
        (lambda paths: change_dicom(paths[1], ImageOrientationPatient=[1, 0, 0, 0, 0, 1]), "mixed series"),
        (lambda paths: change_dicom(paths[1], ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "bad orientation"),
        (lambda paths: change_dicom(paths[1], PixelSpacing=[1.4, 0.7]), "mixed series"),
        (lambda paths: change_dicom(paths[1], NumberOfFrames=2), "multi-frame DICOM"),
        (lambda paths: change_dicom(paths[1], PhotometricInterpretation="RGB", SamplesPerPixel=3), "unknown format"),
        (lambda paths: change_dicom(paths[1], ImagePositionPatient=None), "no orientation"),
        (lambda paths: [change_dicom(path, Modality="MR") for path in paths], "not in HU"),
        (lambda paths: paths[1].write_bytes(paths[1].read_bytes()[:-20]), "broken image"),
        (lambda paths: paths[1].write_bytes(b"CANARY, but no DICOM"), "broken image"),
        (lambda paths: [path.unlink() for path in paths[1:]], "one slice"),
        (lambda paths: [path.unlink() for path in paths], "missing image"),
        (lambda paths: (paths[0].parent / "link.dcm").symlink_to(paths[0]), "bad path"),
    ],
)
def test_a_series_whose_order_would_be_a_guess_is_refused(
    series: list[Path], change: Callable[[list[Path]], object], reason: str
) -> None:
    change(series)
    assert refused(series[0].parent, HU).reason == reason


@pytest.mark.parametrize("num_frames", [1, 9])
def test_an_enhanced_dicom_is_told_to_be_one(series: list[Path], num_frames: int) -> None:
    """As scanners write it: where a frame lies is said in sequences alone."""
    data = pydicom.dcmread(series[0])
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = EnhancedCTImageStorage
    data.NumberOfFrames, data.PixelData = num_frames, data.PixelData * num_frames
    data.SharedFunctionalGroupsSequence = [pydicom.Dataset()]
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(data, name)
    for path in series[1:]:
        path.unlink()
    data.save_as(series[0])
    error = refused(series[0].parent, HU)
    assert error.reason == "multi-frame DICOM"
    assert "single frames, or convert it to NIfTI" in error.detail


@pytest.mark.parametrize("syntax", [DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit])
def test_a_syntax_outside_the_list_is_refused_before_anything_is_unpacked(series: list[Path], syntax: str) -> None:
    data = series[1].read_bytes().replace(b"1.2.840.10008.1.2.1\0", f"{syntax}".encode().ljust(20, b"\0")[:20])
    series[1].write_bytes(data)
    assert refused(series[0].parent, HU).reason in ("unknown format", "broken image")


def test_what_lies_beside_a_series_is_no_slice(series: list[Path]) -> None:
    for name in ("DICOMDIR", ".DS_Store", "Thumbs.db"):
        (series[0].parent / name).write_bytes(b"anything")
    assert read(series[0].parent, HU).voxels.shape == (1, 9, 7, 6)


def test_slices_with_scales_of_their_own_become_floating_point(series: list[Path]) -> None:
    for k, path in enumerate(series):
        change_dicom(path, RescaleSlope=str(1 + k / 4), RescaleIntercept="0", Modality="PT")
    volume = read(series[0].parent)
    assert volume.voxels.dtype == np.float32
    assert volume.voxels[0, 2, 3, 3] == (100 + 1024) * 1.5


def test_no_warning_or_log_quotes_a_header(series: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    for path in series:
        data = path.read_bytes().replace(b"CANARY-7", b"\\CANARY\xff")
        path.write_bytes(data)
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        read(series[0].parent, HU)
    assert not any("CANARY" in str(warning.message) for warning in caught)
    assert "CANARY" not in caplog.text


def test_a_path_out_of_the_raw_folder_or_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_nifti(tmp_path / "v.nii", phantom(), np.eye(4))
    for name, reason in [("../v.nii", "bad path"), ("none.nii", "missing image")]:
        with pytest.raises(ImageError) as error:
            load_volume(tmp_path / "raw", name, CARD)
        assert error.value.reason == reason


@pytest.mark.parametrize("name", ["CANARY.nrrd", "CANARY.mha", "CANARY.dcm"])
def test_other_formats_are_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"NRRD0004")
    error = refused(tmp_path / name)
    assert error.reason == "unknown format"
    assert "expected a .nii or .nii.gz file, or a folder with the DICOM files of one series; convert NRRD" in error.detail
