"""3-D images from a raw export to a release: pinned, checked, normalised; a model that can't read them is refused."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from volume_export import NUM_PATIENTS, export, scan, write_export
from volume_inputs import change_dicom

from draf_dist.data.loader import evaluation_batches
from draf_dist.data.normalise import Normaliser
from draf_dist.data.prepare import inspect_source, prepare
from draf_dist.data.release import Release, index_path, open_release, tar_path
from draf_dist.data.verify import verify
from draf_dist.data.volumes import open_pointer, read_whole
from draf_dist.errors import DataError, SpecError
from draf_dist.models.build import build_model
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.fusion.concat import ConcatConfig
from draf_dist.schema.batch import Batch, ClassTarget
from draf_dist.schema.modality import VolumeSpec
from draf_dist.schema.study import Rejection
from draf_dist.schema.volume import VolumePointer
from draf_dist.storage import open_store
from draf_dist.storage.local import LocalStore

KEY = b"sixteen or more bytes of key"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("raw")
    write_export(folder)
    return folder


@pytest.fixture(scope="module")
def release(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return prepare(export(raw), str(tmp_path_factory.mktemp("out")), subject_key=KEY)


def pointers(release: Release, modality: str) -> dict[str, VolumePointer]:
    """Split and uid -> pointer."""
    spec = next(spec for spec in release.schema.modalities if spec.name == modality)
    assert isinstance(spec, VolumeSpec)
    found = {}
    for shard in release.manifest.shards:
        with tarfile.open(release.store.local_path(tar_path(shard))) as tar:
            for name in tar.getnames():
                if name.endswith(f".{modality}.json"):
                    member = tar.extractfile(name)
                    assert member is not None
                    found[f"{shard.split} {name}"] = open_pointer(member.read(), spec)
    return found


def test_every_volume_of_the_export_is_in_the_release(release: Release) -> None:
    ct = [read_whole(release.store, pointer) for pointer in pointers(release, "ct").values()]
    expected = [scan(i).transpose(2, 1, 0)[None] for i in range(1, NUM_PATIENTS)]
    assert {v.tobytes() for v in ct} == {v.tobytes() for v in expected}
    mr = [read_whole(release.store, pointer) for pointer in pointers(release, "mr").values()]
    assert {v.shape for v in mr} == {(1, 12, 12, 12)}
    assert all(v.dtype == np.float16 and (v[:, -1] == 0).all() for v in mr)
    counts = release.manifest.counts["north"]
    assert sum(split["ct"] for split in counts.values()) == sum(split["mr"] for split in counts.values()) == NUM_PATIENTS - 1


def test_a_release_with_volumes_verifies_and_is_the_same_again(release: Release, raw: Path, tmp_path: Path) -> None:
    report = verify(release)
    stored = sum(release.store.size(path) or 0 for path in release.store.list("volumes"))
    assert report.num_members == NUM_PATIENTS + 2 * (NUM_PATIENTS - 1)
    assert report.size_bytes == stored + sum(shard.size_bytes for shard in release.manifest.shards)
    again = prepare(export(raw), str(tmp_path / "again"), subject_key=KEY)
    assert again.version == release.version
    assert again.store.list("volumes") == release.store.list("volumes")


def test_statistics_are_those_of_all_training_voxels(release: Release) -> None:
    for modality in ("ct", "mr"):
        found = [read_whole(release.store, p) for at, p in pointers(release, modality).items() if at.startswith("train")]
        values = np.concatenate([v.astype(np.float64).ravel() for v in found])
        stats = release.stats.images[modality]
        assert (stats.mean, stats.std, stats.num_images) == pytest.approx((values.mean(), values.std(), len(found)), rel=1e-12)


def test_volumes_are_normalised_on_their_device_and_absent_ones_are_zero(release: Release) -> None:
    ct = torch.from_numpy(np.stack([scan(i)[:8, :8, :8][None] for i in range(3)]))
    mr = torch.full((3, 1, 12, 12, 12), torch.nan, dtype=torch.float16)
    mr[0] = 3
    zeros, ones = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    present = torch.tensor([[True, True], [True, False], [False, False]])
    batch = Batch(
        ("ct", "mr"), {"ct": ct, "mr": mr}, present, ~present, present.float(), present.float(), present,
        ClassTarget(zeros, zeros > 0), zeros, zeros, zeros, ones,
    )  # fmt: skip
    found = Normaliser(release.schema, release.stats)(batch).inputs
    stats = release.stats.images["ct"]
    assert found["ct"].dtype == found["mr"].dtype == torch.float32
    assert torch.allclose(found["ct"][1], (ct[1].float() - stats.mean) / stats.std)
    assert (found["ct"][2] == 0).all()
    assert torch.isfinite(found["mr"]).all()


def test_damage_of_a_volume_is_found_by_verify(release: Release) -> None:
    pointer = next(iter(pointers(release, "ct").values()))
    path = f"{pointer.folder}/{pointer.shards[0].path}"
    whole = release.store.read(path)
    try:
        release.store.write(path, bytes([whole[0] ^ 1, *whole[1:]]))
        with pytest.raises(DataError, match=f"{pointer.digest}.*chunk 0/0/0/0"):
            verify(release)
        release.store.delete(path)
        with pytest.raises(DataError, match="an object of a volume, found nothing"):
            verify(release)
    finally:
        release.store.write(path, whole)


class Stopped(BaseException):
    """What a kill is to the code that it hits."""


@pytest.mark.parametrize("num_writes", [1, 20, 30])
def test_a_writer_that_was_stopped_leaves_nothing_that_is_taken_for_whole(
    release: Release, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_writes: int
) -> None:
    left, write = [num_writes], LocalStore.write

    def stopping(self: LocalStore, path: str, data: bytes) -> None:
        if not left[0]:
            raise Stopped
        left[0] -= 1
        write(self, path, data)

    monkeypatch.setattr(LocalStore, "write", stopping)
    with pytest.raises(Stopped):
        prepare(export(raw), str(tmp_path), subject_key=KEY)
    monkeypatch.setattr(LocalStore, "write", write)
    with pytest.raises(SpecError):
        open_release(str(tmp_path))
    # A tar is there only if all that it points to is.
    store = open_store(str(tmp_path))
    for shard in release.manifest.shards:
        if store.exists(tar_path(shard)) and store.exists(index_path(shard)):
            with tarfile.open(store.local_path(tar_path(shard))) as tar:
                for name in tar.getnames():
                    member = tar.extractfile(name)
                    content = json.loads(member.read()) if member is not None else {}
                    assert "digest" not in content or store.exists(f"volumes/{content['digest']}.zarr/zarr.json")
    assert prepare(export(raw), str(tmp_path), subject_key=KEY).version == release.version
    verify(open_release(str(tmp_path)))


def test_one_volume_under_two_patients_is_a_leak(raw: Path, tmp_path: Path) -> None:
    write_export(tmp_path / "raw")
    (tmp_path / "raw/north/mr4.nii.gz").write_bytes((raw / "north/mr5.nii.gz").read_bytes())
    with pytest.raises(DataError, match="images that belong to one subject"):
        inspect_source(export(tmp_path / "raw"), subject_key=KEY)


def test_a_volume_that_can_not_be_used_is_quarantined_without_a_name(raw: Path, tmp_path: Path) -> None:
    write_export(tmp_path / "raw")
    slices = sorted((tmp_path / "raw/north/ct3").iterdir())
    change_dicom(slices[0], SeriesInstanceUID="1.2.3")
    rejections = [study for study in export(tmp_path / "raw").studies() if isinstance(study, Rejection)]
    assert [(one.where, one.reason) for one in rejections] == [("north/patients.csv row 5", "mixed series")]
    assert not any(word in str(rejections) for word in ("CANARY", "ct3", "P3"))


def test_a_volume_whose_pointer_no_reader_would_open_gets_into_no_release(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="volume too large 7"):
        prepare(export(raw, mr={"shape": [96, 96, 96], "chunk": [2, 2, 2]}), str(tmp_path / "out"), subject_key=KEY)
    assert not (tmp_path / "out/HEAD.json").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"patch": None}, "give `patch`, or `shape`"),
        ({"shape": [7, 9, 9]}, "larger than shape"),
        ({"clip": [5, 5]}, "is empty"),
        ({"spacing_mm": [1, 0, 1]}, "greater than 0"),
        ({"path": "../{file}"}, "inside the raw folder"),
        ({"path": "{site}/scan.nii"}, "path with {file}"),
        ({"absent_at": ["south"]}, "south"),
    ],
)
def test_a_card_whose_volumes_can_not_be_told_is_refused(raw: Path, changes: dict[str, object], problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        export(raw, ct=changes)


def test_the_card_fills_in_what_follows_from_the_rest(raw: Path) -> None:
    ct, mr = export(raw, ct={"patch": [100, 64, 20]}).schema.modalities
    assert isinstance(ct, VolumeSpec)
    assert isinstance(mr, VolumeSpec)
    assert (ct.chunk, ct.clip, ct.fill, ct.unit) == ((32, 32, 16), (-1024, 3071), -1024, "HU")
    assert (mr.chunk, mr.clip, mr.fill, mr.unit) == ((16, 16, 16), None, 0, "")


def test_a_model_reads_volumes_as_the_loader_delivers_them(release: Release) -> None:
    model = build_model(ConcatConfig(width=4), release.schema, seed=0)
    normalise = Normaliser(release.schema, release.stats)
    batch = normalise(next(evaluation_batches(release, "train", 2)))
    logits = model(batch, torch.arange(2 * batch.num_rows).view(2, -1)).logits
    assert logits.shape == (2, batch.num_rows, 2)
    assert logits.isfinite().all()


def test_an_encoder_of_another_kind_is_refused_for_a_volume(release: Release) -> None:
    config = ConcatConfig(encoders=EncoderChoice.model_validate({"by_name": {"ct": {"kind": "image2d"}}}))
    with pytest.raises(SpecError, match="image2d for ct: expected a modality of kind image, found volume"):
        build_model(config, release.schema, seed=0)
