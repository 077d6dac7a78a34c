"""Real MRI outlined by DLMUSE, by the card of the repository: masks lie on the brains, and their volumes are the published ones."""

import csv
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import public_data
import pytest
from torch import Tensor

from draf_dist.data.loader import evaluation_batches
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release
from draf_dist.data.verify import verify
from draf_dist.data.whole_volumes import WholeVolume, whole_volumes
from draf_dist.schema.batch import SegmentationTarget
from draf_dist.schema.label import SegmentationSpec
from draf_dist.schema.release import SPLITS
from draf_dist.sources.card import load_card

CARD = Path(__file__).resolve().parents[2] / "datasets" / "nichart_mri.yaml"
KEY = b"sixteen or more bytes of key"
# Of both sizes that occur.
SUBJECTS = ("Subj1", "Subj5")
VENTRICLES, DEEP_GREY, CORTICAL_GREY, WHITE_MATTER, HINDBRAIN = range(1, 6)
# Third and fourth ventricle, and the lateral ones with their horns.
RAW_VENTRICLES = (4, 11, 49, 50, 51, 52)
VOXEL_MM3 = 8.0
# Of Subj1, 135 x 127 x 106 voxels: the 96 x 112 x 80 that the card keeps.
MIDDLE = (slice(19, 115), slice(7, 119), slice(13, 93))


@pytest.fixture(scope="module")
def demo() -> Path:
    return public_data.folder("nichart_mri") / "demo_dataset"


@pytest.fixture(scope="module")
def release(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    raw: Path = tmp_path_factory.mktemp("raw")
    for subject in SUBJECTS:
        for name in (f"t1/{subject}_T1.nii.gz", f"dlmuse_seg/{subject}_T1_DLMUSE.nii.gz"):
            (raw / "demo_dataset" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(demo / name, raw / "demo_dataset" / name)
    lines = (demo / "participants/participants.csv").read_text().split()
    kept = [line for line in lines if line.startswith(("MRID", *(f"{subject}," for subject in SUBJECTS)))]
    (raw / "demo_dataset/participants").mkdir()
    (raw / "demo_dataset/participants/participants.csv").write_text("\n".join(kept) + "\n")
    return prepare(load_card(CARD).build(raw), str(tmp_path_factory.mktemp("out")), subject_key=KEY)


def volumes(release: Release) -> list[WholeVolume]:
    return [volume for split in SPLITS for volume in whole_volumes(release, split)]


def test_the_first_volume_is_that_of_the_files_voxel_by_voxel(demo: Path, release: Release) -> None:
    # Turned by nibabel's own function; no spacing changes, so what is left is the middle, by the indices that are written here.
    outlines, scan = (
        np.asarray(nib.as_closest_canonical(nib.load(demo / name)).dataobj).transpose(2, 1, 0)[MIDDLE]
        for name in ("dlmuse_seg/Subj1_T1_DLMUSE.nii.gz", "t1/Subj1_T1.nii.gz")
    )
    stored = np.rint(scan).astype(np.int16)
    (volume,) = [one for one in volumes(release) if np.array_equal(one.volumes["t1"][0], stored)]
    assert volume.mask is not None
    mask = volume.mask[0]
    assert np.array_equal(mask == VENTRICLES, np.isin(outlines, RAW_VENTRICLES))
    assert np.array_equal(mask == CORTICAL_GREY, (outlines >= 100) & (outlines <= 207))
    assert np.array_equal(mask == WHITE_MATTER, (outlines >= 81) & (outlines <= 95))
    assert np.array_equal(mask == 0, np.isin(outlines, (0, 1, 46, 69)))
    assert set(np.unique(mask)) == set(range(6))


def test_regions_have_the_published_volumes(demo: Path, release: Release) -> None:
    with (demo / "dlmuse_vol/DLMUSE_Volumes.csv").open() as lines:
        published = {row["MRID"]: row for row in csv.DictReader(lines)}
    label = release.schema.label
    assert isinstance(label, SegmentationSpec)
    assert label.structures[1:] == ("ventricles", "deep_grey", "cortical_grey", "white_matter", "hindbrain")
    found = sorted(float((volume.mask == VENTRICLES).sum()) * VOXEL_MM3 for volume in volumes(release))
    # 509: all ventricles, as DLMUSE counts them before its outlines came to 2 mm.
    assert found == pytest.approx(sorted(float(published[subject]["DL_MUSE_Volume_509"]) for subject in SUBJECTS), rel=0.03)


def test_the_patches_show_what_their_masks_say(release: Release) -> None:
    assert verify(release).num_members == 3 * len(SUBJECTS)
    seen = 0
    for split in SPLITS:
        for batch in evaluation_batches(release, split, 1) if release.shards(split) else ():
            image, target = batch.inputs["t1"], batch.target
            assert isinstance(image, Tensor)
            assert isinstance(target, SegmentationTarget)
            assert target.observed.all()
            scan, mask = image[0, 0].float(), target.mask[0]
            grey = {region: float(scan[mask == region].median()) for region in (VENTRICLES, DEEP_GREY, CORTICAL_GREY, WHITE_MATTER)}
            # What T1 weighting is for: fluid is dark, white matter bright, grey matter between.
            assert grey[VENTRICLES] < 0.6 * grey[CORTICAL_GREY] < grey[CORTICAL_GREY] < grey[WHITE_MATTER]
            assert grey[VENTRICLES] < grey[DEEP_GREY] < grey[WHITE_MATTER]
            spread = sum(float(scan[mask == region].var()) for region in grey)
            shifted = mask.roll(3, 2)
            assert spread < 0.8 * sum(float(scan[shifted == region].var()) for region in grey)
            seen += 1
    assert seen == len(SUBJECTS)
