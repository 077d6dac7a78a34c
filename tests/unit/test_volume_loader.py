"""Volumes in batches: patches where the rule says, the same from a folder and a bucket, damage told like that of any member."""

from pathlib import Path

import numpy as np
import pytest
import torch
from batches import same
from remote_folder import as_remote
from sharded import copied
from volume_export import export, write_export

from draf_dist.data.bad_data import BadData
from draf_dist.data.loader import Loader, Reading, evaluation_batches
from draf_dist.data.node_cache import NodeCache
from draf_dist.data.order import Order
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release
from draf_dist.data.volumes import centre_start, open_pointer, random_start, read_patch
from draf_dist.errors import DataError
from draf_dist.schema.batch import Batch
from draf_dist.schema.modality import VolumeSpec

KEY = b"sixteen or more bytes of key"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    raw: Path = tmp_path_factory.mktemp("raw")
    write_export(raw)
    return prepare(export(raw), str(tmp_path_factory.mktemp("out")), subject_key=KEY)


def order_of(release: Release) -> Order:
    return Order(tuple(shard.num_samples for shard in release.shards("train")), release.version, 1, batch_size=3)


def batches(release: Release, *, num_epochs: int = 2, world: int = 1, **reading: object) -> list[Batch]:
    order = order_of(release)
    loaders = [Loader(release, "train", order, rank=rank, world=world, reading=Reading(**reading)) for rank in range(world)]
    return [batch for loader in loaders for _, batch in loader.batches(0, num_epochs * order.steps_per_epoch)]


def rows(found: list[Batch]) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """(epoch, uid) -> its CT and its MRI."""
    return {
        (int(batch.epoch[row]), int(batch.uid[row])): (batch.inputs["ct"][row].clone(), batch.inputs["mr"][row].clone())
        for batch in found
        for row in range(batch.num_rows)
        if batch.weight[row] > 0
    }


def ct_pointers(release: Release) -> dict[int, bytes]:
    """uid -> the CT's member in the tar."""
    found = {}
    for shard in release.shards("train"):
        index, data = release.index(shard), release.store.read(release.tar_location(shard)[1])
        for i, uid in enumerate(index.uids.tolist()):
            if (member := index.member(i, "ct")) is not None:
                found[uid] = data[member.offset : member.stop]
    return found


def test_a_patch_lies_where_seed_epoch_and_uid_say(release: Release) -> None:
    spec, found = release.schema.modalities[0], rows(batches(release, patch_seed=5))
    assert isinstance(spec, VolumeSpec)
    places = set()
    for uid, pointer in ct_pointers(release).items():
        for epoch in (0, 1):
            start = random_start(open_pointer(pointer, spec), spec, seed=5, epoch=epoch, uid=uid)
            expected = np.empty((1, 8, 8, 8), np.int16)
            read_patch(release.store, pointer, spec, start, expected)
            assert np.array_equal(found[epoch, uid][0].numpy(), expected)
            places.add((uid, start))
    assert len(places) > len(ct_pointers(release))


def test_evaluation_takes_the_middle(release: Release) -> None:
    spec = release.schema.modalities[0]
    assert isinstance(spec, VolumeSpec)
    found, pointers = rows(list(evaluation_batches(release, "train", 4))), ct_pointers(release)
    for (_, uid), (ct, _) in found.items():
        if uid in pointers:
            expected = np.empty((1, 8, 8, 8), np.int16)
            read_patch(release.store, pointers[uid], spec, centre_start(open_pointer(pointers[uid], spec), spec), expected)
            assert np.array_equal(ct.numpy(), expected)
        else:
            assert not ct.any()


def test_a_bucket_gives_what_a_folder_gives_on_any_number_of_ranks(release: Release, tmp_path: Path) -> None:
    remote, _ = as_remote(release)
    cache = NodeCache(tmp_path / "cache", 10**9)
    expected = batches(release)
    assert expected[0].inputs["ct"].dtype == torch.int16
    assert expected[0].inputs["mr"].dtype == torch.float16
    assert all(map(same, expected, batches(remote, cache=cache)))
    one, other = rows(expected), rows(batches(remote, world=2, cache=cache))
    assert one.keys() == other.keys()
    assert all(torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True))


@pytest.mark.parametrize("remote", [False, True])
def test_a_damaged_volume_ends_the_run_or_is_an_absent_modality(release: Release, tmp_path: Path, remote: bool) -> None:
    copy = copied(release, tmp_path / "copy")
    spec = release.schema.modalities[0]
    assert isinstance(spec, VolumeSpec)
    uid, pointer = next(iter(ct_pointers(copy).items()))
    for path in (tmp_path / "copy" / open_pointer(pointer, spec).folder).rglob("*"):
        if path.is_file() and path.name != "zarr.json":
            path.write_bytes(path.read_bytes()[::-1])
    read = as_remote(copy)[0] if remote else copy
    cache = NodeCache(tmp_path / "cache", 10**9)
    with pytest.raises(DataError, match="ct.json: expected a file as schema.json describes it, found volumes/.*chunk"):
        batches(read, cache=cache)
    found = rows(batches(read, num_epochs=1, cache=cache, bad_data=BadData(policy="quarantine", limit=0.5)))
    whole = rows(batches(release, num_epochs=1))
    if (0, uid) in found:  # of a patient without an MRI nothing is left
        assert not found[0, uid][0].any()
        assert torch.equal(found[0, uid][1], whole[0, uid][1])
    others = whole.keys() - {(0, uid)}
    assert others <= found.keys()
    assert all(torch.equal(found[key][0], whole[key][0]) for key in others)
