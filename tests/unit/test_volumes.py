"""Volumes of a release: what zarr reads is what was written, a patch costs the chunks that it touches, damage has a name."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from volume_inputs import SPEC, noise

from draf_dist.data import volumes_write
from draf_dist.data.decode import UndecodableError
from draf_dist.data.volumes import (
    GAP_SHARE,
    centre_start,
    decode_patch,
    delivered_shape,
    fetch_patch,
    open_pointer,
    plan_box,
    plan_patch,
    plan_whole,
    random_start,
    read_patch,
    read_whole,
)
from draf_dist.data.volumes_check import check_volume
from draf_dist.data.volumes_write import (
    POINTER_BYTES,
    POINTER_SHARD_BYTES,
    encode_volume,
    pointer_bytes,
    size_problem,
    sums,
)
from draf_dist.errors import DataError
from draf_dist.schema.modality import VolumeSpec
from draf_dist.schema.volume import VolumePointer
from draf_dist.storage import Store, open_store

# Part of the format of a run: a change would make resumed runs read other patches.
GOLDEN = [(8, 15, 4), (22, 5, 11), (24, 20, 8)]
FREE = SPEC.model_copy(update={"channels": 2})


def written(store: Store, voxels: np.ndarray, spec: VolumeSpec = SPEC) -> VolumePointer:
    pointer, objects = encode_volume(voxels, spec)
    for path, data in objects.items():
        store.write(path, data)
    return open_pointer(pointer.model_dump_json().encode(), spec)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


@pytest.fixture
def pointer(store: Store) -> VolumePointer:
    return written(store, noise())


@pytest.mark.parametrize("dtype", ["int16", "float16"])
def test_zarr_itself_reads_what_was_written(tmp_path: Path, store: Store, dtype: str) -> None:
    voxels, spec = noise((2, 40, 50, 60), dtype), FREE.model_copy(update={"dtype": dtype})
    pointer = written(store, voxels, spec)
    array = zarr.open_array(tmp_path / pointer.folder, mode="r")
    assert array.dtype == voxels.dtype
    assert np.array_equal(array[...], voxels)
    assert array.metadata.dimension_names == ("channel", "superior", "anterior", "right")
    assert array.attrs["spacing_mm"] == [1, 1, 1]
    assert np.array_equal(read_whole(store, pointer), voxels)


def test_the_same_volume_has_the_same_name_and_bytes(pointer: VolumePointer) -> None:
    again, objects = encode_volume(noise(), SPEC)
    assert again == pointer
    assert {stored.size_bytes for stored in pointer.objects} == {len(data) for data in objects.values()}
    assert encode_volume(noise(seed=1), SPEC)[0].digest != pointer.digest


@pytest.mark.parametrize("shard_bytes", [2**27, 2000])
def test_no_pointer_takes_more_than_was_foreseen(monkeypatch: pytest.MonkeyPatch, shard_bytes: int) -> None:
    monkeypatch.setattr(volumes_write, "SHARD_BYTES", shard_bytes)
    # Numbers that take many digits.
    changes = {"spacing_mm": (1.2345678901234567e-05,) * 3, "dtype": "float16", "chunk": (4, 6, 5), "unit": "", "patch": (8, 8, 8)}
    voxels, spec = np.full((2, 80, 17, 19), -65504, np.float16), FREE.model_copy(update=changes)
    voxels[0, 0, 0, 0] = 1
    pointer, _ = encode_volume(voxels, spec)
    spare = pointer_bytes(pointer.shape, pointer.shard, pointer.chunk) - len(pointer.model_dump_json())
    assert len(pointer.shards) == (1 if shard_bytes == 2**27 else 20)
    assert 0 < spare < POINTER_BYTES + len(pointer.shards) * POINTER_SHARD_BYTES


def test_the_largest_volume_in_the_smallest_usual_chunks_but_one_can_be_listed() -> None:
    usual = SPEC.model_copy(update={"chunk": (32, 32, 32)})
    assert size_problem((1, 1024, 1024, 1024), usual) is None
    problem = size_problem((1, 1024, 1024, 1024), usual.model_copy(update={"chunk": (16, 16, 16)}))
    assert problem is not None
    assert "262144 chunks of [16, 16, 16] voxels" in problem


def test_a_large_volume_lies_in_several_shards(monkeypatch: pytest.MonkeyPatch, store: Store, tmp_path: Path) -> None:
    monkeypatch.setattr(volumes_write, "SHARD_BYTES", 8 * 64 * 64 * 2 * 2)
    voxels = noise()
    voxels[:, 32:] = -1024  # a shard that is all fill is stored too: what is missing is lost
    pointer = written(store, voxels)
    assert [shard.path for shard in pointer.shards] == ["c/0/0/0/0", "c/0/1/0/0", "c/0/2/0/0"]
    assert np.array_equal(read_whole(store, pointer), voxels)
    assert np.array_equal(zarr.open_array(tmp_path / pointer.folder, mode="r")[...], voxels)
    out = np.empty(delivered_shape(SPEC), np.int16)
    read_patch(store, pointer.model_dump_json().encode(), SPEC, (10, 20, 20), out)
    assert np.array_equal(out, voxels[:, 10:26, 20:44, 20:52])
    check_volume(store, pointer)


def test_any_box_is_what_was_written_and_costs_little_more_than_its_chunks(store: Store, pointer: VolumePointer) -> None:
    generator, voxels = np.random.default_rng(1), noise()
    for _ in range(40):
        size = [int(generator.integers(1, side + 1)) for side in voxels.shape[1:]]
        start = [int(generator.integers(0, side - length + 1)) for side, length in zip(voxels.shape[1:], size, strict=True)]
        plan = plan_box(pointer, (0, *start), (1, *size))
        out = np.full((1, *size), 7, dtype=np.int16)
        decode_patch(plan, fetch_patch(store, plan), out)
        inside = tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))
        assert np.array_equal(out[0], voxels[0][inside])
        fetched = sum(read.stop - read.start for read in plan.reads)
        assert plan.touched_bytes <= fetched <= (1 + GAP_SHARE) * plan.touched_bytes
        grid = [(first + n - 1) // c - first // c + 1 for first, n, c in zip(start, size, SPEC.chunk, strict=True)]
        assert len(plan.chunks) == np.prod(grid)


def test_chunks_of_nothing_but_fill_are_not_stored(pointer: VolumePointer) -> None:
    plan = plan_box(pointer, (0, 0, 0, 0), (1, 16, 48, 48))
    assert plan.reads == ()
    out = np.empty((1, 16, 48, 48), np.int16)
    decode_patch(plan, [], out)
    assert (out == -1024).all()


def test_neighbours_are_fetched_as_one_range(pointer: VolumePointer) -> None:
    (read,) = plan_whole(pointer).reads
    (shard,) = pointer.shards
    assert read.sha256 == shard.sha256
    assert read.stop - read.start == plan_whole(pointer).touched_bytes


def test_a_random_place_is_a_function_of_seed_epoch_and_uid(pointer: VolumePointer) -> None:
    places = np.array([random_start(pointer, SPEC, seed=1, epoch=0, uid=uid) for uid in range(600)])
    assert random_start(pointer, SPEC, seed=1, epoch=0, uid=5) == tuple(places[5])
    assert random_start(pointer, SPEC, seed=1, epoch=1, uid=5) != tuple(places[5])
    assert random_start(pointer, SPEC, seed=2, epoch=0, uid=5) != tuple(places[5])
    # Every place, and none outside; each axis by itself.
    assert [set(axis) for axis in places.T] == [set(range(25)), set(range(27)), set(range(29))]
    assert np.abs(np.corrcoef(places.T) - np.eye(3)).max() < 0.15
    expected = 600 / 25
    assert ((np.bincount(places[:, 0]) - expected) ** 2 / expected).sum() < 52  # chi-square of 24 degrees: 99.9 %


def test_golden_places(pointer: VolumePointer) -> None:
    places = [random_start(pointer, SPEC, seed=7, epoch=3, uid=uid) for uid in (0, -5, 2**62)]
    assert places == GOLDEN


def test_a_modality_on_the_same_grid_is_cut_at_the_same_place(store: Store, pointer: VolumePointer) -> None:
    other = SPEC.model_copy(update={"name": "pet", "dtype": "float16"})
    second = written(store, noise(dtype="float16"), other)
    assert random_start(second, other, seed=1, epoch=2, uid=3) == random_start(pointer, SPEC, seed=1, epoch=2, uid=3)
    assert centre_start(pointer, SPEC) == (12, 13, 14)


def test_a_damaged_chunk_is_named_with_its_volume(store: Store, pointer: VolumePointer) -> None:
    path = f"{pointer.folder}/c/0/0/0/0"
    offset, size = pointer.tables.by_path["c/0/0/0/0"][0, 3, 1, 2].tolist()
    data = bytearray(store.read(path))
    data[offset + size // 2] ^= 1
    store.write(path, bytes(data))
    inside, outside = np.empty((1, 8, 8, 8), np.int16), np.empty((1, 8, 8, 8), np.int16)
    plan = plan_box(pointer, (0, 24, 20, 36), (1, 8, 8, 8))
    with pytest.raises(UndecodableError, match=rf"{pointer.digest}.zarr: chunk 0/3/1/2: other bytes"):
        decode_patch(plan, fetch_patch(store, plan), inside)
    plan = plan_box(pointer, (0, 24, 0, 0), (1, 8, 8, 8))
    decode_patch(plan, fetch_patch(store, plan), outside)
    with pytest.raises(DataError, match=f"{pointer.digest}.zarr.*chunk 0/3/1/2"):
        check_volume(store, pointer)


def test_a_shard_that_is_gone_or_cut_is_told(store: Store, pointer: VolumePointer) -> None:
    path, plan = f"{pointer.folder}/c/0/0/0/0", plan_whole(pointer)
    whole = store.read(path)
    store.write(path, whole[: len(whole) // 2])
    with pytest.raises(UndecodableError, match="expected"):
        fetch_patch(store, plan)
    with pytest.raises(DataError, match="bytes"):
        check_volume(store, pointer)
    store.delete(path)
    with pytest.raises(UndecodableError, match="not there"):
        fetch_patch(store, plan)
    with pytest.raises(DataError, match="nothing"):
        check_volume(store, pointer)


def test_metadata_with_another_codec_is_refused(store: Store) -> None:
    pointer, objects = encode_volume(noise(), SPEC)
    content = json.loads(objects[f"{pointer.folder}/zarr.json"])
    content["codecs"][0]["configuration"]["codecs"][1] = {"name": "numcodecs.pickle", "configuration": {}}
    metadata = json.dumps(content).encode()
    stored = volumes_write._stored("zarr.json", metadata)
    digest = volumes_write.digest_of((*pointer.shards, stored))
    forged = pointer.model_copy(update={"metadata": stored, "digest": digest})
    for path, data in objects.items():
        store.write(path.replace(pointer.digest, digest), metadata if path.endswith("zarr.json") else data)
    with pytest.raises(DataError, match=r"zarr.json: expected codecs as the pointer says"):
        check_volume(store, forged)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"shape": [1, 60000, 4096, 4096]}, "less than or equal"),
        ({"shape": [1, 4096, 4096, 4096]}, "too many voxels"),
        ({"chunk": [1, 7, 16, 16]}, "whole chunks"),
        ({"shards": []}, "at least 1"),
        ({"dtype": "object"}, "int16"),
        ({"dtype": "float16"}, "type, channels"),
        ({"fill": 0}, "type, channels"),
        ({"metadata": {"path": "../../HEAD.json", "size_bytes": 1, "sha256": "0" * 64}}, "pattern"),
    ],
)
def test_a_hostile_pointer_is_refused(pointer: VolumePointer, changes: dict[str, object], found: str) -> None:
    content = pointer.model_dump(mode="json") | changes
    with pytest.raises(UndecodableError, match=found):
        open_pointer(json.dumps(content).encode(), SPEC)


def test_an_index_that_leads_out_of_its_shard_is_refused(pointer: VolumePointer) -> None:
    content = pointer.model_dump(mode="json")
    index = bytearray(base64.b64decode(content["shards"][0]["index"]))
    for offset, size in ((2**64 - 2, 2), (0, 2**63), (2**63, 2**63)):
        index[-20:-4] = np.array([offset, size], dtype="<u8").tobytes()
        content["shards"][0]["index"] = base64.b64encode(index).decode()
        with pytest.raises(UndecodableError, match="leads out"):
            open_pointer(json.dumps(content).encode(), SPEC)


def test_a_volume_smaller_than_the_patch_is_refused(pointer: VolumePointer) -> None:
    data = pointer.model_dump_json().encode()
    with pytest.raises(UndecodableError, match="at least"):
        open_pointer(data, SPEC.model_copy(update={"patch": (64, 16, 16)}))
    with pytest.raises(ValueError, match="inside"):
        plan_patch(pointer, SPEC, (30, 0, 0))


def test_sums_are_exact() -> None:
    voxels = noise(dtype="float16")
    total, squares = sums(voxels)
    wide = voxels.astype(np.float64).ravel()
    assert total == sum(int(v * 2**24) for v in wide)
    assert squares == sum(int(v * 2**24) ** 2 for v in wide)
    assert sums(noise()) == (int(noise().astype(np.int64).sum()), int((noise().astype(np.int64) ** 2).sum()))
