"""Members that can't be used: under `fail` the run ends, under `quarantine` that member alone is left out, told and counted."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from remote_folder import as_remote
from sharded import copied, order_of, real_rows, sharded_release, tar_of

from draf_dist.data.bad_data import BadData
from draf_dist.data.loader import Loader, Reading, SplitLoader, evaluation_batches
from draf_dist.data.node_cache import NodeCache
from draf_dist.data.release import Release, index_path, tar_path
from draf_dist.data.shards import Member
from draf_dist.errors import DataError
from draf_dist.schema.batch import Batch
from draf_dist.schema.release import Split

SPARE = Reading(bad_data=BadData(policy="quarantine", limit=0.5))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return sharded_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def copy(release: Release, tmp_path: Path) -> Release:
    return copied(release, tmp_path / "copy")


def flip(release: Release, member: Member, split: Split = "train") -> None:
    path = release.store.local_path(tar_path(release.shards(split)[0]))
    assert path is not None
    with path.open("r+b") as file:
        file.seek(member.offset + member.size - 1)
        last = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([last[0] ^ 1]))


def epoch(release: Release, reading: Reading = SPARE) -> tuple[Loader, list[Batch]]:
    order = order_of(release)
    loader = Loader(release, "train", order, reading=reading)
    return loader, [batch for _, batch in loader.batches(0, order.steps_per_epoch)]


def first_with(release: Release, *modalities: str) -> int:
    """The first sample of the first shard that has just these modalities."""
    index = release.index(release.shards("train")[0])
    wanted = [name in modalities for name in index.modalities]
    return next(i for i in range(index.num_samples) if index.present[i].tolist() == wanted)


def test_a_flipped_byte_costs_that_modality_of_that_sample_and_nothing_else(release: Release, copy: Release) -> None:
    index = copy.index(copy.shards("train")[0])
    i = first_with(copy, "cxr", "vitals", "history")
    member = index.member(i, "vitals")
    assert member is not None
    flip(copy, member)
    whole, (loader, found) = real_rows(epoch(release)[1]), epoch(copy)
    rows = real_rows(found)
    assert rows.keys() == whole.keys()
    assert {uid for uid in rows if not all(map(torch.equal, rows[uid], whole[uid]))} == {int(index.uids[i])}
    (batch,) = [batch for batch in found if int(index.uids[i]) in batch.uid.tolist()]
    row = batch.uid.tolist().index(int(index.uids[i]))
    assert batch.present[row].tolist() == [True, False, True]
    assert not batch.inputs["vitals"].values[row].any()
    assert loader.stats().left_out == 1
    (told,) = loader.left_out
    assert "vitals.npy: expected" in told.message


@pytest.mark.parametrize("part", ["json", "only modality"])
def test_a_sample_of_which_nothing_is_left_is_padding(copy: Release, part: str) -> None:
    index = copy.index(copy.shards("train")[0])
    i = 0
    members = [index.meta(i)] if part == "json" else [m for name in index.modalities if (m := index.member(i, name))]
    for member in members:
        flip(copy, member)
    loader, found = epoch(copy)
    uid = int(index.uids[i])
    assert uid not in real_rows(found)
    num_rows = sum(int((batch.weight > 0).sum()) for batch in found)
    assert num_rows == order_of(copy).num_samples - 1
    for batch in found:
        padding = batch.weight == 0
        assert torch.equal(batch.uid == -1, padding)
        assert batch.present[padding].tolist() == [[True, False, False]] * int(padding.sum())
        assert not batch.inputs["cxr"][padding].any()
    assert loader.stats().left_out == len(members)


@pytest.mark.parametrize("remote", [False, True])
def test_a_shard_that_is_gone_costs_its_samples(copy: Release, tmp_path: Path, remote: bool) -> None:
    tar_of(copy).unlink()
    reading = Reading(bad_data=SPARE.bad_data, cache=NodeCache(tmp_path / "cache", 10**9))
    loader, found = epoch(as_remote(copy)[0] if remote else copy, reading)
    lost = set(copy.index(copy.shards("train")[0]).uids.tolist())
    assert not lost & real_rows(found).keys()
    assert len(real_rows(found)) == order_of(copy).num_samples - len(lost)
    assert loader.stats().left_out == len(lost)


@pytest.mark.parametrize("remote", [False, True])
def test_a_shard_without_its_index_costs_its_samples(copy: Release, tmp_path: Path, remote: bool) -> None:
    shard = copy.shards("train")[1]
    Path(copy.url, index_path(shard)).unlink()
    reading = Reading(bad_data=SPARE.bad_data, cache=NodeCache(tmp_path / "cache", 10**9))
    _, found = epoch(as_remote(copy)[0] if remote else copy, reading)
    assert len(real_rows(found)) == order_of(copy).num_samples - shard.num_samples


def test_of_a_remote_shard_that_is_cut_short_what_is_there_is_used(copy: Release, tmp_path: Path) -> None:
    index, content = copy.index(copy.shards("train")[0]), tar_of(copy).read_bytes()
    half = len(content) // 2
    tar_of(copy).write_bytes(content[:half])
    remote, _ = as_remote(copy)
    reading = Reading(bad_data=SPARE.bad_data, cache=NodeCache(tmp_path / "cache", 10**9))
    _, found = epoch(remote, reading)
    whole = [int(uid) for i, uid in enumerate(index.uids) if index.extent(i)[1] <= half]
    assert whole
    assert set(whole) <= real_rows(found).keys()


def test_more_than_the_limit_ends_the_run_and_says_how_many(copy: Release) -> None:
    tar_of(copy).unlink()
    with pytest.raises(DataError, match=r"at most 1.0% of the members unusable, found \d+ of \d+; the last one: "):
        epoch(copy, Reading(bad_data=BadData(policy="quarantine", limit=0.01)))


def test_by_default_the_first_one_ends_the_run(copy: Release) -> None:
    flip(copy, copy.index(copy.shards("train")[0]).meta(0))
    with pytest.raises(DataError, match="crc32"):
        epoch(copy, Reading())


def test_what_is_left_out_does_not_depend_on_ranks_or_threads(copy: Release) -> None:
    index = copy.index(copy.shards("train")[0])
    for i in (0, 3):
        flip(copy, index.meta(i))
    order = order_of(copy)
    expected = real_rows(epoch(copy)[1])
    for world, threads in ((2, 1), (3, 4)):
        loaders = [Loader(copy, "train", order, rank=rank, world=world, threads=threads, reading=SPARE) for rank in range(world)]
        found = real_rows([batch for loader in loaders for _, batch in loader.batches(0, order.steps_per_epoch)])
        assert found.keys() == expected.keys()


def test_memory_that_is_used_again_shows_nothing_of_an_earlier_batch(release: Release) -> None:
    order = order_of(release)
    loader, first = Loader(release, "train", order), {}
    for step, batch in loader.batches(0, order.steps_per_epoch):
        pixels = batch.inputs["cxr"]
        assert not pixels[~batch.present[:, 0]].any()
        first[step] = zlib.crc32(np.ascontiguousarray(pixels.numpy()))
    again = {
        step: zlib.crc32(np.ascontiguousarray(batch.inputs["cxr"].numpy()))
        for step, batch in Loader(release, "train", order, threads=4).batches(0, order.steps_per_epoch)
    }
    assert first == again


def test_a_batch_that_is_kept_is_not_written_over(release: Release) -> None:
    order = order_of(release)
    kept = [(batch, batch.inputs["cxr"].clone()) for _, batch in Loader(release, "train", order).batches(0, order.steps_per_epoch)]
    assert all(torch.equal(batch.inputs["cxr"], pixels) for batch, pixels in kept)


def test_an_image_that_is_left_out_has_no_quality(release: Release, copy: Release) -> None:
    known = {int(batch.uid[row]) for batch in epoch(release)[1] for row in batch.quality_known[:, 0].nonzero().flatten().tolist()}
    index = copy.index(copy.shards("train")[0])
    i = next(i for i in range(index.num_samples) if int(index.uids[i]) in known and index.present[i].sum() > 1)
    member = index.member(i, "cxr")
    assert member is not None
    flip(copy, member)
    (batch,) = [batch for batch in epoch(copy)[1] if int(index.uids[i]) in batch.uid.tolist()]
    row = batch.uid.tolist().index(int(index.uids[i]))
    assert not batch.present[row, 0]
    assert not batch.quality_known[row].any()
    assert not batch.quality[row].any()


class Inverted:
    """A hook that changes every image."""

    def levels(self, uid: torch.Tensor, epoch: torch.Tensor) -> dict[str, NDArray[np.int64]]:
        return {"cxr": np.ones(len(uid), dtype=np.int64)}

    def change(self, image: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        return 255 - image

    def severity(self, index: int) -> float:
        return 1.0


def test_nothing_is_done_to_a_row_that_became_padding(copy: Release) -> None:
    flip(copy, copy.index(copy.shards("train")[0]).meta(0))
    order = order_of(copy)
    loader = Loader(copy, "train", order, decode=Inverted(), reading=SPARE)
    found = [batch for _, batch in loader.batches(0, order.steps_per_epoch)]
    assert any(batch.severity.any() for batch in found)
    for batch in found:
        padding = batch.weight == 0
        assert not batch.severity[padding].any()
        assert not batch.inputs["cxr"][padding].any()


def test_what_is_left_out_again_and_again_is_listed_once(copy: Release) -> None:
    flip(copy, copy.index(copy.shards("train")[0]).meta(0))
    order = order_of(copy)
    loader = Loader(copy, "train", order, reading=SPARE)
    assert sum(1 for _ in loader.batches(0, 3 * order.steps_per_epoch)) == 3 * order.steps_per_epoch
    assert (loader.stats().left_out, loader.stats().lost_samples, len(loader.left_out)) == (3, 3, 1)


@pytest.mark.parametrize("world", [1, 2])
def test_a_pass_over_a_split_leaves_out_what_it_may_and_counts_it_every_time(copy: Release, world: int) -> None:
    index, whole = copy.index(copy.shards("val")[0]), copy.manifest.receipts["val"].count
    flip(copy, index.meta(0), "val")
    with pytest.raises(DataError, match="crc32"):
        list(evaluation_batches(copy, "val", 8))
    splits = [SplitLoader(copy, "val", 8, rank=rank, world=world, reading=SPARE) for rank in range(world)]
    for passes in (1, 2):
        rows = real_rows([batch for split in splits for batch in split.batches()])
        assert len(rows) == whole - 1
        assert sum(split.stats().lost_samples for split in splits) == passes
        assert sum(len(split.left_out) for split in splits) == 1
    if world == 1:
        assert sum(batch.num_rows for batch in evaluation_batches(copy, "val", 8, bad_data=SPARE.bad_data)) == whole - 1
