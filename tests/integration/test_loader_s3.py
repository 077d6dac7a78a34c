"""The loader on a real S3 server: the same batches as from a local folder, and clear errors where an object is damaged."""

from pathlib import Path

import pytest
import torch
from memory_source import KEY, MemorySource

from draf_dist.data.loader import Loader, evaluation_batches
from draf_dist.data.order import Order
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release, open_release, tar_path
from draf_dist.errors import DataError
from draf_dist.schema.batch import Batch, SeriesInput

SOURCE = MemorySource(num_studies=120)


def prepared(url: str) -> Release:
    return prepare(SOURCE, url, subject_key=KEY, shard_size_bytes=60_000)


def content(batch: Batch) -> dict[str, bytes]:
    """Every tensor of a batch as bytes, by name."""
    found: dict[str, bytes] = {}

    def visit(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value.numpy().tobytes()
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(f"{name}.{key}", item)
        elif isinstance(value, Batch | SeriesInput) or hasattr(value, "__dataclass_fields__"):
            for key, item in vars(value).items():
                visit(f"{name}.{key}", item)

    visit("batch", batch)
    return found


def order_of(release: Release) -> Order:
    sizes = tuple(shard.num_samples for shard in release.shards("train"))
    return Order(shard_sizes=sizes, release=release.version, seed=1, batch_size=16, groups=8, open_samples=64)


@pytest.mark.timeout(120)
def test_batches_from_s3_equal_those_from_a_folder_byte_for_byte(s3, tmp_path: Path) -> None:
    local, remote = prepared(str(tmp_path)), prepared(f"{s3.url}/small")
    assert local.version == remote.version
    order = order_of(local)
    for world in (1, 3):
        for rank in range(world):
            one, other = (
                Loader(release, "train", order, rank=rank, world=world).batches(0, 2 * order.steps_per_epoch)
                for release in (local, remote)
            )
            for (step, expected), (same_step, found) in zip(one, other, strict=True):
                assert step == same_step
                assert content(expected) == content(found)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("block_bytes", [512, 5000])
def test_a_member_may_lie_in_several_blocks(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    local, remote = prepared(str(tmp_path)), prepared(f"{s3.url}/small")
    for module in ("remote_shards", "loader"):
        monkeypatch.setattr(f"draf_dist.data.{module}.BLOCK_BYTES", block_bytes)
    # The same bytes in blocks of another size lie there from another test.
    monkeypatch.setenv("DRAF_CACHE_DIR", str(tmp_path / "cache"))
    pairs = zip(evaluation_batches(local, "test", 8), evaluation_batches(remote, "test", 8), strict=True)
    assert all(content(one) == content(other) for one, other in pairs)


def replace_shard(release: Release, data: bytes | None) -> None:
    path = tar_path(release.shards("train")[0])
    if data is None:
        release.store.delete(path)
    else:
        release.store.write(path, data)


@pytest.mark.timeout(120)
def test_a_damaged_object_is_named(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = prepared(f"{s3.url}/small")
    shard = release.shards("train")[0]
    whole = release.store.read(tar_path(shard))
    member = release.index(shard).meta(0)
    flipped = bytearray(whole)
    flipped[member.offset + 3] ^= 1
    for data, found in ((bytes(flipped), "other bytes"), (whole[:3000], "an end (after|before)"), (None, "nothing")):
        # Else the good bytes of an earlier turn would still be on the node.
        monkeypatch.setenv("DRAF_CACHE_DIR", str(tmp_path / found.replace(" ", "_")))
        replace_shard(release, data)
        with pytest.raises(DataError, match=found) as caught:
            list(evaluation_batches(open_release(f"{s3.url}/small"), "train", 8))
        assert shard.sha256 in str(caught.value)
        assert release.pinned_url in str(caught.value)
    replace_shard(release, whole)
    assert sum(batch.num_rows for batch in evaluation_batches(release, "train", 8)) == sum(
        one.num_samples for one in release.shards("train")
    )
