"""Damage and failures: an error that names where it is, and threads that end."""

import threading
from pathlib import Path

import numpy as np
import pytest
from sharded import copied, order_of, sharded_release, tar_of
from torch import Tensor

from draf_dist.data.loader import Loader, Reading, evaluation_batches
from draf_dist.data.order import Order
from draf_dist.data.release import Release
from draf_dist.errors import DataError
from draf_dist.schema.batch import Batch
from draf_dist.schema.identity import uid_name


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return sharded_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def copy(release: Release, tmp_path: Path) -> Release:
    return copied(release, tmp_path / "copy")


# Damage.


def damage(release: Release, number: int, at: int, data: bytes) -> None:
    with tar_of(release, number).open("r+b") as file:
        file.seek(at)
        file.write(data)


def read_all(release: Release) -> list[Batch]:
    return list(evaluation_batches(release, "train", 8))


def test_a_flipped_byte_is_named_with_its_release_shard_and_member(copy: Release) -> None:
    shard = copy.shards("train")[1]
    index = copy.index(shard)
    member = index.member(2, "history")
    assert member is not None
    damage(copy, 1, member.offset + 130, b"\x55")
    with pytest.raises(DataError) as caught:
        read_all(copy)
    message = str(caught.value)
    assert copy.pinned_url in message
    assert shard.sha256 in message
    assert f"{uid_name(int(index.uids[2]))}.history.npy" in message


def test_good_batches_come_before_the_broken_one(copy: Release) -> None:
    order = order_of(copy)
    expected = dict(Loader(copy, "train", order).batches(0, order.steps_per_epoch))
    index = copy.index(copy.shards("train")[0])
    damage(copy, 0, index.meta(0).offset, b"[")
    step = next(step for step, batch in expected.items() if int(index.uids[0]) in batch.uid.tolist())
    found: list[int] = []
    batches = Loader(copy, "train", order, reading=Reading(prefetch=6)).batches(0, order.steps_per_epoch)
    with pytest.raises(DataError, match="crc32"):  # noqa: PT012
        for number, _ in batches:
            found.append(number)
    assert found == list(range(step))


def test_a_truncated_shard_is_an_error_and_kills_nothing(copy: Release) -> None:
    path = tar_of(copy)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"shard [0-9a-f]{64}: expected \d+ bytes, found 2000 bytes"):
        read_all(copy)


def test_a_shard_that_is_gone_is_an_error(copy: Release) -> None:
    tar_of(copy).unlink()
    with pytest.raises(DataError, match=r"shard [0-9a-f]{64}: expected a shard, found No such file"):
        read_all(copy)


def test_an_index_that_is_gone_is_an_error(copy: Release) -> None:
    for path in Path(copy.url).rglob("*.idx"):
        path.unlink()
    with pytest.raises(DataError, match=r"\.idx: expected"):
        read_all(copy)


class Failing:
    """A decode thread that goes wrong in a way nobody foresaw."""

    def levels(self, uid: Tensor, epoch: Tensor) -> dict[str, np.ndarray]:
        return {"cxr": np.ones(len(uid), dtype=np.int64)}

    def change(self, image: np.ndarray, index: int) -> np.ndarray:
        raise RuntimeError("the codec fell over")

    def severity(self, index: int) -> float:
        return 1.0


def decode_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "fetch"))]


@pytest.mark.timeout(30)
def test_whatever_a_thread_raises_reaches_the_caller(release: Release) -> None:
    loader = Loader(release, "train", order_of(release), decode=Failing())
    with pytest.raises(RuntimeError, match="the codec fell over"):
        next(iter(loader.batches()))
    assert decode_threads() == []


@pytest.mark.timeout(30)
def test_closing_the_generator_ends_its_threads(release: Release) -> None:
    batches = Loader(release, "train", order_of(release), threads=3).batches()
    next(batches)
    assert decode_threads() != []
    batches.close()
    assert decode_threads() == []


def test_no_more_batches_are_made_than_prefetch_allows(release: Release) -> None:
    class Counting:
        def __init__(self, order: Order) -> None:
            self.order, self.batch_size, self.steps = order, order.batch_size, 0

        def draws(self, step: int) -> object:
            self.steps += 1
            return self.order.draws(step)

        def locate(self, source: int, epoch: int, sample: int) -> tuple[int, int]:
            return self.order.locate(source, epoch, sample)

    plan = Counting(order_of(release))
    batches = Loader(release, "train", plan, reading=Reading(prefetch=2)).batches()
    for taken in range(1, 6):
        next(batches)
        assert plan.steps == taken + 2
    batches.close()
