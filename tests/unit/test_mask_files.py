"""Masks in files: they belong to the very voxels of their image, however both are stored."""

import gzip
from pathlib import Path

import mask_export
import nibabel as nib
import numpy as np
import pytest
from mask_export import AXES, image_of, raw_mask, save
from volume_inputs import write_dicom

from draf_dist.errors import DataError
from draf_dist.schema.study import RawVolume, Rejection, Study
from draf_dist.sources.card_segmentation import SegmentationCard
from draf_dist.sources.card_volume import VolumeCard
from draf_dist.sources.images import ImageError
from draf_dist.sources.mask_files import load_mask
from draf_dist.sources.volume_files import load_volume

VOLUME = VolumeCard(name="mr", table="t", file="f", path="{file}", spacing_mm=(1, 1, 1), patch=(8, 8, 8))
SPACING = (1.5, 1.25, 2.0)


def label() -> SegmentationCard:
    found = mask_export.card().chosen_label
    assert isinstance(found, SegmentationCard)
    return found


def image(folder: Path, axes: str = "RAS") -> RawVolume:
    save(folder / "image.nii.gz", image_of(raw_mask(3), 3), SPACING, axes=axes)
    return load_volume(folder, "image.nii.gz", VOLUME)[0]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("mask_axes", AXES)
def test_a_mask_lies_on_its_image_however_both_are_stored(tmp_path: Path, axes: str, mask_axes: str) -> None:
    save(tmp_path / "mask.nii.gz", raw_mask(3), SPACING, axes=mask_axes)
    scan = image(tmp_path, axes)
    mask = load_mask(tmp_path, "mask.nii.gz", label(), scan)
    assert mask is not None
    assert np.array_equal(mask.voxels, mask_export.structures(scan.voxels // mask_export.NOISE))
    assert np.array_equal(mask.voxels[0], mask_export.structures(raw_mask(3)).transpose(2, 1, 0))


def test_the_affine_says_where_a_voxel_lies(tmp_path: Path) -> None:
    for axes in AXES:
        affine = image(tmp_path, axes).affine
        assert affine is not None
        x, y, z = np.array(mask_export.ORIGIN_MM) + np.array(SPACING) * (3, 4, 5)
        assert affine @ (5, 4, 3, 1) == pytest.approx([x, y, z])


def test_a_mask_of_a_dicom_series_lies_on_it(tmp_path: Path) -> None:
    voxels = image_of(raw_mask(4), 4)
    write_dicom(tmp_path / "series", voxels, spacing=SPACING)
    scan, _ = load_volume(tmp_path, "series", VOLUME)
    affine = np.diag([*SPACING, 1.0])
    nib.save(nib.Nifti1Image(raw_mask(4), affine), tmp_path / "mask.nii")
    mask = load_mask(tmp_path, "mask.nii", label(), scan)
    assert mask is not None
    assert np.array_equal(mask.voxels, mask_export.structures(scan.voxels // mask_export.NOISE))
    nib.save(nib.Nifti1Image(raw_mask(4), affine + np.eye(4, k=3)), tmp_path / "beside.nii")
    with pytest.raises(ImageError, match="mask off its image"):
        load_mask(tmp_path, "beside.nii", label(), scan)


def test_a_mask_of_other_voxels_is_refused_with_both(tmp_path: Path) -> None:
    scan = image(tmp_path)
    save(tmp_path / "mask.nii.gz", raw_mask(3)[:-1], SPACING)
    found = "the mask has 19 x 12 x 16 voxels .* the affine .*, its image 19 x 12 x 17 voxels .* resample it"
    with pytest.raises(ImageError, match=f"mask off its image: {found}"):
        load_mask(tmp_path, "mask.nii.gz", label(), scan)


@pytest.mark.parametrize(("shift_mm", "is_refused"), [(0.01, False), (0.3, True), (-40.0, True)])
def test_a_mask_that_is_shifted_is_refused_unless_by_rounding(tmp_path: Path, shift_mm: float, is_refused: bool) -> None:
    scan = image(tmp_path)
    save(tmp_path / "mask.nii", raw_mask(3), SPACING)
    shifted = nib.load(tmp_path / "mask.nii")
    affine = shifted.affine.copy()
    affine[1, 3] += shift_mm
    nib.save(nib.Nifti1Image(raw_mask(3), affine), tmp_path / "mask.nii")
    if is_refused:
        with pytest.raises(ImageError, match="mask off its image: .* affine .* its image .* affine"):
            load_mask(tmp_path, "mask.nii", label(), scan)
    else:
        assert load_mask(tmp_path, "mask.nii", label(), scan) is not None


def test_a_mask_of_another_spacing_or_flipped_is_refused(tmp_path: Path) -> None:
    scan = image(tmp_path)
    save(tmp_path / "wide.nii", raw_mask(3), (1.5, 1.25, 2.1))
    # The same numbers, said to lie the other way round.
    flipped = np.diag([-1.5, 1.25, 2.0, 1.0])
    flipped[:3, 3] = mask_export.ORIGIN_MM
    nib.save(nib.Nifti1Image(raw_mask(3), flipped), tmp_path / "flipped.nii")
    for name in ("wide.nii", "flipped.nii"):
        with pytest.raises(ImageError, match="mask off its image"):
            load_mask(tmp_path, name, label(), scan)


def test_no_file_is_no_mask_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    scan = image(tmp_path)
    assert load_mask(tmp_path, "nowhere.nii.gz", label(), scan) is None
    (tmp_path / "cut.nii.gz").write_bytes(gzip.compress(b"")[:-4])
    with pytest.raises(ImageError, match="broken image|unknown format"):
        load_mask(tmp_path, "cut.nii.gz", label(), scan)
    with pytest.raises(ImageError, match="bad path"):
        load_mask(tmp_path / "north", "../image.nii.gz", label(), scan)
    (tmp_path / "mask.nrrd").write_bytes(b"NRRD")
    with pytest.raises(ImageError, match="unknown format"):
        load_mask(tmp_path, "mask.nrrd", label(), scan)


def read(raw: Path, **label: object) -> tuple[list[Study], list[Rejection]]:
    items = list(mask_export.export(raw, label=label).studies())
    return [one for one in items if isinstance(one, Study)], [one for one in items if isinstance(one, Rejection)]


def test_a_study_without_a_mask_is_kept_without_a_label(tmp_path: Path) -> None:
    mask_export.write_export(tmp_path)
    studies, rejections = read(tmp_path)
    assert rejections == []
    without = {study.subject for study in studies if study.mask is None}
    assert without == {f"P{mask_export.WITHOUT_MASK}", f"P{mask_export.WITHOUT_IMAGE}"}
    assert all(study.label.drawn == (study.mask is not None) for study in studies)


def test_a_column_names_the_masks_where_the_card_says_so(tmp_path: Path) -> None:
    mask_export.write_export(tmp_path)
    table = tmp_path / "north/patients.csv"
    lines = [
        f"{line},{'outline' if i == 0 else '' if i < 4 else f'{i - 1}.nii.gz'}" for i, line in enumerate(table.read_text().split())
    ]
    table.write_text("\n".join(lines) + "\n")
    studies, _ = read(tmp_path, file="outline")
    assert {study.subject for study in studies if study.mask is not None} == {f"P{i}" for i in range(3, mask_export.NUM_PATIENTS)}


def test_a_bad_mask_sets_its_study_aside_without_a_name(tmp_path: Path) -> None:
    mask_export.write_export(tmp_path)
    save(tmp_path / "north/masks/4.nii.gz", raw_mask(5))
    _, rejections = read(tmp_path)
    assert [(one.where, one.reason) for one in rejections] == [("north/patients.csv row 6", "mask off its image")]
    assert "4.nii" not in rejections[0].detail
    _, rejections = read(tmp_path, others=None)
    assert {one.reason for one in rejections} == {"mask off its image", "unmapped value"}


def test_one_mask_of_two_subjects_is_refused(tmp_path: Path) -> None:
    mask_export.write_export(tmp_path)
    table = tmp_path / "north/patients.csv"
    lines = [f"{line},{'outline' if i == 0 else 'same.nii.gz'}" for i, line in enumerate(table.read_text().split())]
    table.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="expected an image file of one subject only"):
        read(tmp_path, file="outline")


def test_a_site_of_which_no_mask_is_found_is_told(tmp_path: Path) -> None:
    mask_export.write_export(tmp_path)
    found = mask_export.export(tmp_path, label={"path": "{site}/mask/{file}"})
    assert all(isinstance(study, Study) and study.mask is None for study in found.studies())
    assert found.counts.variables["mr.parts"].empty_at == ["north"]
    found = mask_export.export(tmp_path)
    list(found.studies())
    assert (found.counts.variables["mr.parts"].observed, found.counts.variables["mr.parts"].empty_at) == (8, [])
