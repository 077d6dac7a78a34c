"""Shards on a local disk whose files change while they are open: the right bytes, or an error with a name; never a crash."""

import os
from pathlib import Path

import pytest
import torch
from sharded import copied, order_of, real_rows, sharded_release, tar_of, uids
from torch import Tensor

from draf_dist.data.bad_data import BadData
from draf_dist.data.loader import Loader, Reading
from draf_dist.data.release import Release
from draf_dist.errors import DataError
from draf_dist.schema.batch import Batch

CUT_BYTES = 512


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return sharded_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def copy(release: Release, tmp_path: Path) -> Release:
    return copied(release, tmp_path / "copy")


class Reader:
    """Reads on where it has stopped, with every shard open after the first epoch; nothing is read ahead."""

    def __init__(self, release: Release, bad_data: BadData | None = None) -> None:
        order = order_of(release)
        self.loader = Loader(release, "train", order, reading=Reading(prefetch=0, bad_data=bad_data or BadData()))
        self.steps = order.steps_per_epoch
        self._batches = self.loader.batches(0, 2 * self.steps)

    def epoch(self) -> dict[int, list[Tensor]]:
        return real_rows([self.batch() for _ in range(self.steps)])

    def batch(self) -> Batch:
        return next(self._batches)[1]


def lost(release: Release) -> set[int]:
    """The uids of the first shard."""
    return set(release.index(release.shards("train")[0]).uids.tolist())


def second_epoch(release: Release) -> dict[int, list[Tensor]]:
    reader = Reader(release)
    reader.epoch()
    return reader.epoch()


def equal(found: dict[int, list[Tensor]], expected: dict[int, list[Tensor]]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(one, other) for uid in found for one, other in zip(found[uid], expected[uid], strict=True)
    )


def test_a_shard_that_is_cut_short_while_open_ends_the_run_at_its_next_sample(release: Release, copy: Release) -> None:
    whole, reader = Reader(release), Reader(copy)
    whole.epoch(), reader.epoch()
    os.truncate(tar_of(copy), CUT_BYTES)
    while not lost(copy) & set(uids([whole.batch()])):
        reader.batch()
    with pytest.raises(DataError, match=rf"shard {copy.shards('train')[0].sha256}: expected \d+ bytes, found {CUT_BYTES} bytes"):
        reader.batch()


def test_a_shard_that_is_cut_short_while_open_is_left_out_where_that_is_allowed(release: Release, copy: Release) -> None:
    reader = Reader(copy, BadData(policy="quarantine", limit=0.5))
    assert lost(copy) <= reader.epoch().keys()
    os.truncate(tar_of(copy), CUT_BYTES)
    expected = second_epoch(release)
    assert equal(reader.epoch(), {uid: expected[uid] for uid in expected.keys() - lost(copy)})
    assert reader.loader.stats().left_out == len(lost(copy))
    assert all(copy.shards("train")[0].sha256 in one.message for one in reader.loader.left_out)


def renamed_over(path: Path, content: bytes) -> None:
    """Another file in its place, as programs do that write files whole."""
    beside = path.with_name("beside")
    beside.write_bytes(content)
    beside.replace(path)


@pytest.mark.parametrize("size", ["same", "other"])
def test_what_is_put_in_place_of_an_open_shard_is_not_read_by_this_run_and_refused_by_the_next(
    release: Release, copy: Release, size: str
) -> None:
    reader = Reader(copy)
    reader.epoch()
    length = tar_of(copy).stat().st_size
    renamed_over(tar_of(copy), bytes(length if size == "same" else length // 2))
    assert equal(reader.epoch(), second_epoch(release))
    with pytest.raises(DataError, match=copy.shards("train")[0].sha256):
        Reader(copy).epoch()


def test_a_shard_that_is_restored_beside_a_damaged_one_is_read_at_once(release: Release, copy: Release) -> None:
    reader = Reader(copy)
    reader.epoch()
    content = tar_of(copy).read_bytes()
    with tar_of(copy).open("r+b") as file:
        file.write(bytes(len(content)))
    renamed_over(tar_of(copy), content)
    assert equal(reader.epoch(), second_epoch(release))
