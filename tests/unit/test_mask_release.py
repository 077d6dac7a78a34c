"""Masks from a raw export to a release and into batches: the planted values, on the voxels of the image, or nothing."""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import same
from mask_export import NOISE, NUM_PATIENTS, export, raw_mask, structures, write_export
from numpy.typing import NDArray
from remote_folder import as_remote
from sharded import copied

from draf_dist.continual.known import compare
from draf_dist.data import encode
from draf_dist.data.arena import Arena
from draf_dist.data.bad_data import BadData
from draf_dist.data.corruption import Corruptor, TrainingCorruption
from draf_dist.data.decode import UndecodableError
from draf_dist.data.encode import UnfitError, encode_study
from draf_dist.data.gather import Spool, gather
from draf_dist.data.loader import Loader, Reading, evaluation_batches
from draf_dist.data.masks import fitted_mask, mask_problem, nearest
from draf_dist.data.node_cache import NodeCache
from draf_dist.data.normalise import Normaliser
from draf_dist.data.order import Order
from draf_dist.data.patches import Patch
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release, tar_path
from draf_dist.data.targets import MaskRows
from draf_dist.data.verify import verify
from draf_dist.data.volumes import centre_start, open_pointer, plan_patch, random_start, read_whole
from draf_dist.data.volumes_write import encode_volume
from draf_dist.errors import DataError
from draf_dist.schema.batch import Batch, SegmentationTarget, hide
from draf_dist.schema.label import IGNORED
from draf_dist.schema.modality import VolumeSpec
from draf_dist.schema.study import MaskLabel, RawVolume, Study
from draf_dist.schema.volume import VolumePointer
from draf_dist.storage.local import LocalStore

KEY = b"sixteen or more bytes of key"
# (X, Y, Z) in mm: one axis gets finer, the others coarser.
COARSE = (0.9, 1.37, 0.7)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("raw")
    write_export(folder)
    return folder


@pytest.fixture(scope="module")
def release(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return prepare(export(raw), str(tmp_path_factory.mktemp("out")), subject_key=KEY)


def members(release: Release, suffix: str) -> dict[int, bytes]:
    """uid -> a member of every sample that has it."""
    found = {}
    for shard in release.manifest.shards:
        with tarfile.open(release.store.local_path(tar_path(shard))) as tar:
            for name in tar.getnames():
                if name.endswith(f".{suffix}"):
                    member = tar.extractfile(name)
                    assert member is not None
                    found[int(name.split(".")[0], 16)] = member.read()
    return found


def mask_spec(release: Release) -> VolumeSpec:
    spec = release.schema.mask
    assert spec is not None
    return spec


def masks(release: Release) -> dict[int, NDArray[np.int16]]:
    """uid -> the whole mask."""
    spec = mask_spec(release)
    return {uid: read_whole(release.store, open_pointer(data, spec)) for uid, data in members(release, "parts.json").items()}


def training(release: Release, *, num_epochs: int = 2, world: int = 1, **reading: object) -> list[Batch]:
    order = Order(tuple(shard.num_samples for shard in release.shards("train")), release.version, 1, batch_size=3)
    loaders = [Loader(release, "train", order, rank=rank, world=world, reading=Reading(**reading)) for rank in range(world)]
    return [batch for loader in loaders for _, batch in loader.batches(0, num_epochs * order.steps_per_epoch)]


def rows(batches: list[Batch]) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, bool]]:
    """Epoch, uid, image, mask and whether it is known."""
    for batch in batches:
        assert isinstance(batch.target, SegmentationTarget)
        assert batch.target.mask.dtype == torch.int64
        for row in np.flatnonzero(batch.weight.numpy() > 0):
            known = bool(batch.target.observed[row])
            yield int(batch.epoch[row]), int(batch.uid[row]), batch.inputs["mr"][row], batch.target.mask[row], known


def nearest_by_hand(plane: NDArray[np.int64], old: tuple[float, ...], new: tuple[float, ...]) -> NDArray[np.int64]:
    """Every new voxel's nearest old one by the distance of their centres, both grids about one centre."""
    for axis, (one, other) in enumerate(zip(old, new, strict=True)):
        have = plane.shape[axis]
        want = max(1, round(have * one / other))
        centres = (np.arange(have) - (have - 1) / 2) * one
        places = (np.arange(want) - (want - 1) / 2) * other
        plane = plane.take([int(np.abs(centres - place).argmin()) for place in places], axis=axis)
    return plane


# What is stored.


def test_the_masks_of_the_release_are_the_planted_ones(release: Release) -> None:
    expected = [structures(raw_mask(i)).transpose(2, 1, 0) for i in range(2, NUM_PATIENTS)]
    assert {m.tobytes() for m in masks(release).values()} == {m.astype(np.int16).tobytes() for m in expected}


def test_masks_are_counted_verified_and_the_same_again(release: Release, raw: Path, tmp_path: Path) -> None:
    counts = release.manifest.counts["north"]
    assert sum(split["parts"] for split in counts.values()) == NUM_PATIENTS - 2
    assert sum(split["studies"] for split in counts.values()) == NUM_PATIENTS
    report = verify(release)
    assert report.num_members == 2 * NUM_PATIENTS + (NUM_PATIENTS - 1) + (NUM_PATIENTS - 2)
    assert sorted(release.subjects()["label"].to_pylist()) == ["-"] * 2 + ["mask"] * (NUM_PATIENTS - 2)
    again = prepare(export(raw), str(tmp_path / "again"), subject_key=KEY)
    assert (again.version, again.store.list("volumes")) == (release.version, release.store.list("volumes"))


def test_resampled_masks_take_the_nearest_voxel_and_no_other_value(tmp_path: Path) -> None:
    write_export(tmp_path / "raw", COARSE)
    found = masks(prepare(export(tmp_path / "raw"), str(tmp_path / "out"), subject_key=KEY))
    planted = [structures(raw_mask(i)).transpose(2, 1, 0) for i in range(2, NUM_PATIENTS)]
    expected = [nearest_by_hand(mask, COARSE[::-1], (1, 1, 1)) for mask in planted]
    assert {m.tobytes() for m in found.values()} == {m.astype(np.int16).tobytes() for m in expected}
    assert {m.shape[1:] for m in found.values()} == {m.shape for m in expected}


def test_a_mask_is_cropped_and_padded_as_its_image_with_background(tmp_path: Path, raw: Path) -> None:
    shape = [17, 25, 16]
    release = prepare(export(raw, mr={"shape": shape, "patch": None}), str(tmp_path), subject_key=KEY)
    image_spec = release.schema.modalities[0]
    assert isinstance(image_spec, VolumeSpec)
    images = members(release, "mr.json")
    for uid, mask in masks(release).items():
        image = read_whole(release.store, open_pointer(images[uid], image_spec))
        assert mask.shape == image.shape == (1, *shape)
        assert np.array_equal(mask, structures(image // NOISE))


def test_of_two_voxels_equally_near_the_lower_one_is_taken() -> None:
    plane = np.arange(6, dtype=np.int16)[:, None, None]
    assert nearest(plane, (1, 1, 1), (2, 1, 1))[:, 0, 0].tolist() == [0, 2, 4]
    assert nearest(plane, (0.1, 1, 1), (0.2, 1, 1))[:, 0, 0].tolist() == [0, 2, 4]
    assert nearest(plane, (3, 1, 1), (1, 1, 1))[:, 0, 0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3


# What is delivered.


def test_a_training_patch_has_the_mask_of_the_same_voxels(release: Release) -> None:
    image_spec, spec, whole = release.schema.modalities[0], mask_spec(release), masks(release)
    assert isinstance(image_spec, VolumeSpec)
    pointers = members(release, "mr.json")
    starts = set()
    for epoch, uid, image, mask, known in rows(training(release, patch_seed=5)):
        assert known == (uid in whole)
        if known:
            start = random_start(open_pointer(pointers[uid], image_spec), image_spec, seed=5, epoch=epoch, uid=uid)
            box = tuple(slice(first, first + side) for first, side in zip(start, spec.delivered, strict=True))
            assert np.array_equal(mask.numpy(), whole[uid][0][box])
            assert np.array_equal(mask.numpy(), structures(image[0].numpy() // NOISE))
            starts.add((uid, start))
        else:
            assert not mask.any()
    assert len(starts) > len({uid for uid, _ in starts})


def test_an_evaluation_patch_has_the_mask_of_the_middle(release: Release) -> None:
    spec, whole, num_known = mask_spec(release), masks(release), 0
    pointers = members(release, "parts.json")
    for split in ("train", "val", "test"):
        for _, uid, image, mask, known in rows(list(evaluation_batches(release, split, 4))):
            assert known == (uid in whole)
            if known:
                start = centre_start(open_pointer(pointers[uid], spec), spec)
                box = tuple(slice(first, first + side) for first, side in zip(start, spec.delivered, strict=True))
                assert np.array_equal(mask.numpy(), whole[uid][0][box])
                assert np.array_equal(mask.numpy(), structures(image[0].numpy() // NOISE))
                num_known += 1
    assert num_known == len(whole)


def test_ignored_voxels_are_delivered_as_such(raw: Path, tmp_path: Path) -> None:
    release = prepare(export(raw, label={"others": "ignored"}), str(tmp_path), subject_key=KEY)
    verify(release)
    for _, _, image, mask, known in rows(training(release, num_epochs=1)):
        if known:
            raw_values = image[0].numpy() // NOISE
            assert np.array_equal(mask.numpy(), np.where(raw_values == 9, IGNORED, structures(raw_values)))


def test_a_bucket_gives_what_a_folder_gives_on_any_number_of_ranks(release: Release, tmp_path: Path) -> None:
    remote, cache, expected = as_remote(release)[0], NodeCache(tmp_path / "cache", 10**9), training(release)
    assert all(map(same, expected, training(remote, cache=cache)))
    one, other = (
        {(e, u): m for e, u, _, m, _ in rows(training(r, **k))} for r, k in ((release, {}), (remote, {"world": 2, "cache": cache}))
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_no_corruption_reaches_a_mask(release: Release) -> None:
    normaliser = Normaliser(release.schema, release.stats)
    law = TrainingCorruption(probability=1.0, modality_dropout=0.9)
    changed = 0
    for batch in training(release):
        clean = normaliser(batch)
        corrupted = Corruptor(law, normaliser, seed=1).train(clean)
        assert isinstance(clean.target, SegmentationTarget)
        assert isinstance(corrupted.target, SegmentationTarget)
        assert torch.equal(corrupted.target.mask, clean.target.mask)
        assert torch.equal(corrupted.target.observed, clean.target.observed)
        changed += int((corrupted.present != clean.present).any() or corrupted.corrupted.any())
    assert changed


def test_memory_of_a_mask_that_is_used_again_shows_nothing_of_it(release: Release) -> None:
    rows_ = MaskRows(mask_spec(release), 3, 2, Arena())
    rows_.mask[:] = 2
    rows_.set(0, MaskLabel(drawn=False))
    rows_.clear(1)
    target = rows_.target()
    assert isinstance(target, SegmentationTarget)
    assert not target.mask.any()
    assert not target.observed.any()
    hidden = hide(SegmentationTarget(torch.ones(2, 4, 4, 4).long(), torch.ones(2).bool()), torch.tensor([True, False]))
    assert isinstance(hidden, SegmentationTarget)
    assert [bool(hidden.mask[row].any()) for row in range(2)] == [True, False]


# What is refused.


def break_object(release: Release, pointer: VolumePointer) -> None:
    path = f"{pointer.folder}/{pointer.shards[0].path}"
    content = release.store.read(path)
    release.store.write(path, bytes([content[0] ^ 1, *content[1:]]))


def test_damage_of_a_mask_is_found_by_verify(release: Release, tmp_path: Path) -> None:
    copy = copied(release, tmp_path / "copy")
    uid, data = next(iter(members(copy, "parts.json").items()))
    pointer = open_pointer(data, mask_spec(copy))
    break_object(copy, pointer)
    with pytest.raises(DataError, match=f"{pointer.digest}.*chunk 0/0/0/0"):
        verify(copy)
    copy.store.delete(f"{pointer.folder}/zarr.json")
    with pytest.raises(DataError, match="an object of a volume, found nothing"):
        verify(copy)
    assert uid


@pytest.mark.parametrize("remote", [False, True])
def test_a_damaged_mask_ends_the_run_or_is_hidden(release: Release, tmp_path: Path, remote: bool) -> None:
    copy = copied(release, tmp_path / "copy")
    trained = {uid for _, uid, _, _, known in rows(training(release, num_epochs=1)) if known}
    broken = min(trained)
    pointer = open_pointer(members(copy, "parts.json")[broken], mask_spec(copy))
    # Of all chunks, for the patch may touch any.
    path = Path(copy.url) / pointer.folder / pointer.shards[0].path
    path.write_bytes(path.read_bytes()[::-1])
    read, cache = as_remote(copy)[0] if remote else copy, NodeCache(tmp_path / "cache", 10**9)
    with pytest.raises(DataError, match=r"parts.json: expected a file as schema.json describes it, found volumes/.*chunk"):
        training(read, cache=cache)
    found = list(rows(training(read, num_epochs=1, cache=cache, bad_data=BadData(policy="quarantine", limit=0.5))))
    assert {uid for _, uid, _, _, known in found if known} == trained - {broken}
    image, mask = next((image, mask) for _, uid, image, mask, _ in found if uid == broken)
    assert image.any()
    assert not mask.any()


def test_a_mask_without_its_image_is_hidden(release: Release, tmp_path: Path) -> None:
    copy = copied(release, tmp_path / "copy")
    image_spec = copy.schema.modalities[0]
    assert isinstance(image_spec, VolumeSpec)
    broken = min(uid for _, uid, _, _, known in rows(training(release, num_epochs=1)) if known)
    pointer = open_pointer(members(copy, "mr.json")[broken], image_spec)
    path = Path(copy.url) / pointer.folder / pointer.shards[0].path
    path.write_bytes(path.read_bytes()[::-1])
    found = training(copy, num_epochs=1, bad_data=BadData(policy="quarantine", limit=0.5))
    image, mask, known = next((image, mask, known) for _, uid, image, mask, known in rows(found) if uid == broken)
    assert not image.any()
    assert not mask.any()
    assert not known


def test_a_mask_that_does_not_fit_is_set_aside(raw: Path) -> None:
    source = export(raw)
    study = next(one for one in source.studies() if isinstance(one, Study) and one.mask is not None)
    assert study.mask is not None
    assert encode_study(study, source.schema).present == ("mr", "clinic", "parts")
    smaller = RawVolume(study.mask.voxels[:, 1:], study.mask.spacing_mm)
    beyond = RawVolume(study.mask.voxels + np.int16(1), study.mask.spacing_mm)
    for changed, problem in (
        (replace(study, mask=smaller), "mask off its image"),
        (replace(study, mask=beyond), "values from 1 to 3 in a mask of 3 structures"),
        (replace(study, volumes={}), "a mask without mr"),
        (replace(study, mask=None), "does not speak of|other way round"),
        (replace(study, label=MaskLabel(drawn=False)), "does not speak of"),
        (replace(study, label=1), "another kind"),
    ):
        with pytest.raises(UnfitError, match=problem):
            encode_study(changed, source.schema)


def test_values_that_are_no_structure_are_refused_when_read(release: Release, tmp_path: Path) -> None:
    spec, store = mask_spec(release), LocalStore(tmp_path)
    found = MaskRows(spec, 3, 1, Arena())
    for value, is_refused in ((2, False), (IGNORED, False), (3, True), (-2, True)):
        voxels = np.zeros((1, 8, 8, 8), dtype=np.int16)
        voxels[0, 1, 2, 3] = value
        pointer, objects = encode_volume(voxels, spec)
        for path, content in objects.items():
            store.write(path, content)
        patch = Patch.fetched(plan_patch(pointer, spec, (0, 0, 0)), store)
        assert (mask_problem(voxels, 3) is not None) == is_refused
        if is_refused:
            with pytest.raises(UndecodableError, match="in a mask of 3 structures"):
                found.decode(0, patch)
        else:
            found.decode(0, patch)
            assert found.mask[0, 1, 2, 3] == value


def test_a_delivery_knows_a_study_by_its_mask_too(release: Release, raw: Path, tmp_path: Path) -> None:
    def known(folder: Path) -> tuple[int, int, int]:
        spool = Spool(tmp_path / f"spool-{folder.name}")
        source = export(folder)
        found = gather(source, spool, subject_key=KEY, limit=0.0, on_progress=lambda done, total: None)
        answer = compare(release, spool, found.rows)
        return len(answer.new), len(answer.same), len(answer.changed)

    assert known(raw) == (0, NUM_PATIENTS, 0)
    write_export(tmp_path / "changed")
    (tmp_path / "changed/north/masks/5.nii.gz").unlink()
    assert known(tmp_path / "changed") == (0, NUM_PATIENTS - 1, 1)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda mask: np.concatenate([mask, mask[:, :1]], axis=1),
            r"parts.json: .* found a mask of \[20, .*\] voxels, expected the \[19, ",
        ),
        (lambda mask: mask + np.int16(7), r"parts.json: expected the structures of schema.json, found values from 7 to 9"),
    ],
)
def test_a_mask_that_does_not_fit_its_image_is_found(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[NDArray[np.int16]], NDArray[np.int16]], told: str
) -> None:
    monkeypatch.setattr(encode, "fitted_mask", lambda *given: spoil(fitted_mask(*given)))
    found = prepare(export(raw), str(tmp_path), subject_key=KEY)
    with pytest.raises(DataError, match=told):
        verify(found)
    with pytest.raises(DataError, match=r"parts.json: expected a file as schema.json describes it"):
        training(found)


@pytest.mark.parametrize("said", ["mask", "-"])
def test_a_label_that_says_something_else_of_its_mask_is_found(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr("draf_dist.data.gather.label_text", lambda task, label: said)
    found = prepare(export(raw), str(tmp_path), subject_key=KEY)
    with pytest.raises(DataError, match="json: expected a mask where the label says so, and nowhere else"):
        verify(found)
    if said == "mask":
        with pytest.raises(DataError, match="json: expected a mask, as it says, found none"):
            [*training(found), *evaluation_batches(found, "val", 2), *evaluation_batches(found, "test", 2)]
    else:
        assert not any(known for *_, known in rows(training(found)))
