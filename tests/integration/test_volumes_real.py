"""Real CT and MRI: where organs are tells how scans lie; a release with them on a real S3 server, by patches, damaged, killed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import public_data
import pytest
from conftest import S3
from numpy.typing import NDArray

from draf_dist.config.spec import parse_yaml, validate_spec
from draf_dist.data.decode import UndecodableError
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release, open_release, tar_path
from draf_dist.data.verify import verify
from draf_dist.data.volumes import decode_patch, fetch_patch, open_pointer, plan_patch, random_start, read_whole
from draf_dist.data.volumes_fit import fitted
from draf_dist.data.volumes_write import encode_volume
from draf_dist.errors import SpecError
from draf_dist.schema.modality import VolumeSpec
from draf_dist.schema.volume import VolumePointer
from draf_dist.sources.card_volume import VolumeCard
from draf_dist.sources.hospital_export import HospitalExport, HospitalExportCard
from draf_dist.sources.volume_files import load_volume
from draf_dist.storage import open_store

ROOT = Path(__file__).resolve().parents[2]
KEY = b"sixteen or more bytes of key"
SUBJECTS = (1, 5, 20)
LIVER, SOLID_ORGANS = 5, (1, 5, 79)
BRAINS = """
name: brains
licence: {name: research}
split: {public_subject_key: true}
sites: {folders: [demo]}
tables: {participants: {path: participants.csv, subject: MRID}}
studies: {table: participants}
label: sex
labels: {sex: {column: Sex, classes: [F, M]}}
modalities:
  - {kind: volume, name: t1, table: participants, file: t1, path: "t1/{file}", spacing_mm: [2, 2, 2], patch: [48, 48, 48]}
  - {kind: volume, name: flair, table: participants, file: fl, path: "fl/{file}", spacing_mm: [3, 3, 3], shape: [64, 64, 64], dtype: float16}
"""  # noqa: E501


def card(**changes: object) -> VolumeCard:
    return VolumeCard(
        **{"name": "ct", "table": "t", "file": "f", "path": "{file}", "spacing_mm": (3, 3, 3), "patch": (16, 16, 16), **changes}
    )


def spread(scan: NDArray[np.int16], labels: NDArray[np.int16]) -> float:
    """Mean variance inside the organs that a segmentation outlines."""
    organs = [scan[labels == label].astype(np.float64) for label in SOLID_ORGANS]
    return float(np.average([organ.var() for organ in organs], weights=[organ.size for organ in organs]))


def test_a_real_series_lies_as_its_segmentation_says() -> None:
    # The outlines are a NIfTI file, whose orientation says itself how it lies: two formats, one place.
    folder = public_data.folder("volume_samples") / "totalsegmentator"
    found = load_volume(folder, "example_ct_dicom", card(unit="HU"))[0]
    outlines = load_volume(folder, "example_seg_dicom.nii.gz", card())[0]
    assert found.voxels.shape == outlines.voxels.shape
    assert found.spacing_mm == pytest.approx(outlines.spacing_mm, rel=1e-3)
    ct, organs = found.voxels[0], outlines.voxels[0].astype(np.int16)
    assert 40 < np.median(ct[organs == LIVER]) < 160
    as_read = spread(ct, organs)
    for axes in [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]:
        assert spread(np.flip(ct, axes), organs) > 3 * as_read


def test_a_real_series_compressed_by_jpeg_2000_is_in_hounsfield_units() -> None:
    raw = load_volume(public_data.folder("volume_samples") / "totalsegmentator", "example_ct_dicom", card(unit="HU"))[0]
    assert raw.voxels.dtype == np.int16
    assert raw.voxels.shape == (1, 20, 512, 512)
    assert raw.spacing_mm == pytest.approx((2.0, 0.9765625, 0.9765625))
    assert (raw.voxels.min(), raw.voxels.max()) == (-1024, 1839)
    stored = fitted(raw, card(unit="HU", spacing_mm=(2, 3, 3), shape=(20, 160, 160), patch=None).spec())
    assert np.abs(np.percentile(stored, [5, 50, 95]) - np.percentile(raw.voxels, [5, 50, 95])).max() < 60


@pytest.fixture(scope="module")
def brains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    demo, raw = public_data.folder("nichart_mri") / "demo_dataset", Path(tmp_path_factory.mktemp("brains"))
    sexes = dict(line.split(",")[::2] for line in (demo / "participants/participants.csv").read_text().split())
    rows = ["MRID,Sex,t1,fl"]
    for subject in (f"Subj{number}" for number in SUBJECTS):
        rows.append(f"{subject},{sexes[subject]},{subject}_T1.nii.gz,{subject}_FL.nii.gz")
        for folder, suffix in (("t1", "T1"), ("fl", "FL")):
            (raw / folder).mkdir(exist_ok=True)
            shutil.copy(demo / folder / f"{subject}_{suffix}.nii.gz", raw / folder)
    (raw / "participants.csv").write_text("\n".join(rows) + "\n")
    (raw / "card.yaml").write_text(BRAINS)
    return raw


def source(raw: Path) -> HospitalExport:
    return HospitalExport(validate_spec(parse_yaml(BRAINS, where="card"), HospitalExportCard, where="card"), raw)


def pointers(release: Release, spec: VolumeSpec) -> dict[int, VolumePointer]:
    found = {}
    for shard in release.manifest.shards:
        index = release.index(shard)
        for i in range(index.num_samples):
            member = index.member(i, spec.name)
            assert member is not None
            data = release.store.read_range(tar_path(shard), member.offset, member.stop)
            found[int(index.uids[i])] = open_pointer(data, spec)
    return found


def test_real_brains_on_s3_by_patches(s3: S3, brains: Path, tmp_path: Path) -> None:
    release = prepare(source(brains), f"{s3.url}/brains", subject_key=KEY)
    local = prepare(source(brains), str(tmp_path / "brains"), subject_key=KEY)
    assert release.version == local.version
    assert verify(release).num_members == 3 * len(SUBJECTS)
    t1, flair = release.schema.modalities
    assert isinstance(t1, VolumeSpec)
    assert isinstance(flair, VolumeSpec)
    assert {pointer.shape for pointer in pointers(release, flair).values()} == {(1, 64, 64, 64)}
    found = pointers(release, t1)
    assert len({pointer.shape for pointer in found.values()}) == 2  # two scanners, each brain keeps its own size
    whole = {uid: read_whole(local.store, pointer) for uid, pointer in found.items()}
    out, touched = np.empty((1, 48, 48, 48), np.int16), 0
    before = release.store.traffic.snapshot()
    for epoch in range(4):
        for uid, pointer in found.items():
            start = random_start(pointer, t1, seed=3, epoch=epoch, uid=uid)
            plan = plan_patch(pointer, t1, start)
            decode_patch(plan, fetch_patch(release.store, plan), out)
            touched += plan.touched_bytes
            assert np.array_equal(out, whole[uid][:, *(slice(first, first + 48) for first in start)])
    fetched = release.store.traffic.snapshot().bytes_read - before.bytes_read
    assert touched <= fetched <= 1.3 * touched


def test_a_damaged_chunk_on_s3_is_named(s3: S3, brains: Path) -> None:
    spec, store = source(brains).schema.modalities[0], open_store(s3.url)
    assert isinstance(spec, VolumeSpec)
    raw, _ = load_volume(brains, "t1/Subj1_T1.nii.gz", card(spacing_mm=(2, 2, 2)))
    pointer, objects = encode_volume(fitted(raw, spec), spec)
    path, (offset, size) = f"{pointer.folder}/c/0/0/0/0", pointer.tables.by_path["c/0/0/0/0"][0, 1, 1, 1].tolist()
    data = bytearray(objects[path])
    data[offset + size // 2] ^= 1
    store.write(path, bytes(data))
    with pytest.raises(UndecodableError, match=f"{pointer.digest}.zarr: chunk 0/1/1/1: other bytes"):
        read_whole(store, pointer)
    store.delete(path)
    with pytest.raises(UndecodableError, match="not there"):
        read_whole(store, pointer)


KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}, {tests!r}]
from pathlib import Path
from draf_dist.storage.s3 import S3Store
from test_volumes_real import KEY, prepare, source
write, left = S3Store.write, [5]
def stopping(self, path, data):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, path, data)
S3Store.write = stopping
prepare(source(Path({raw!r})), {url!r}, subject_key=KEY)
"""


def test_after_a_kill_amid_volumes_there_is_no_release_and_the_next_run_makes_the_whole_one(s3: S3, brains: Path) -> None:
    here, url = Path(__file__).resolve().parent, f"{s3.url}/killed"
    script = KILLED.format(here=str(here), tests=str(here.parent), raw=str(brains), url=url)
    killed = subprocess.run([sys.executable, "-c", script], env=os.environ | s3.server.environment, cwd=ROOT, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert len(open_store(f"{s3.url}/killed").list()) == 4
    with pytest.raises(SpecError):
        open_release(url)
    release = prepare(source(brains), url, subject_key=KEY)
    assert verify(release).num_samples == len(SUBJECTS)
