"""A small release in several shards, for tests of the loader."""

import shutil
from pathlib import Path

from batches import tensors
from memory_source import KEY, MemorySource
from torch import Tensor

from draf_dist.data.order import Order
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release, open_release, tar_path
from draf_dist.schema.batch import Batch

SHARD_BYTES = 60_000
BATCH_SIZE = 16


def sharded_release(folder: Path) -> Release:
    return prepare(MemorySource(num_studies=150), str(folder), subject_key=KEY, shard_size_bytes=SHARD_BYTES)


def copied(release: Release, folder: Path) -> Release:
    """A release of one's own, to be broken."""
    shutil.copytree(release.url, folder)
    return open_release(str(folder))


def tar_of(release: Release, number: int = 0) -> Path:
    """The file of a training shard."""
    path = release.store.local_path(tar_path(release.shards("train")[number]))
    assert path is not None
    return path


def order_of(release: Release, batch_size: int = BATCH_SIZE, seed: int = 3) -> Order:
    sizes = tuple(shard.num_samples for shard in release.shards("train"))
    return Order(shard_sizes=sizes, release=release.version, seed=seed, batch_size=batch_size, groups=8, open_samples=64)


def real_rows(batches: list[Batch]) -> dict[int, list[Tensor]]:
    """uid -> its row of every tensor, padding left out."""
    return {
        int(batch.uid[row]): [tensor[row] for tensor in tensors(batch)]
        for batch in batches
        for row in range(batch.num_rows)
        if batch.weight[row] > 0
    }


def uids(batches: list[Batch]) -> list[int]:
    return [uid for batch in batches for uid in batch.uid.tolist() if uid != -1]
