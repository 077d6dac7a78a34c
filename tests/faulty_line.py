"""A release in a bucket behind a faulty line, and an epoch of it in which something happens."""

import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from fault_server import FaultServer
from reading_ranks import Reader, Seen, read
from remote_release import own_release, put

from draf_dist.data.node_cache import NodeCache
from draf_dist.data.pipeline import reach
from draf_dist.data.release import Release, open_release
from draf_dist.data.remote_shards import BLOCK_BYTES
from draf_dist.data.shard_reader import ShardReader
from draf_dist.data.working_set import working_set
from draf_dist.errors import DrafError
from draf_dist.launch.local_s3 import LocalS3
from draf_dist.schema.identity import uid_name

BEGIN = 6  # the step after which things happen
SMALL_BLOCKS = 2**13


@dataclass(frozen=True)
class Place:
    """A release in a bucket behind a faulty line. local: the same in a folder, which knows of no faults."""

    url: str
    local: Release
    faults: FaultServer
    server: LocalS3
    cache: Path

    def reader(self, **changes: object) -> Reader:
        """One that has fetched little ahead when things happen."""
        reader = Reader(self.url, self.cache, prefetch=0, batch_size=16, block_bytes=SMALL_BLOCKS)
        return replace(reader, **changes)

    @property
    def steps(self) -> range:
        return range(self.reader().order(self.local).steps_per_epoch)

    def expected(self, epochs: int = 1) -> Seen:
        return read(self.reader(), self.local, range(epochs * len(self.steps)))


def upload(server: LocalS3, folder: Path, num_samples: int, num_shards: int) -> tuple[str, Release]:
    local = own_release(folder / "release", num_samples, num_shards)
    url = f"{server.create_bucket(f'chaos-{secrets.token_hex(4)}')}/wards"
    with patch.dict(os.environ, server.environment):
        put(folder / "release", url)
    return url, local


def read_through(place: Place, happens: Callable[[], object], **changes: object) -> Seen:
    """An epoch in which something happens after step BEGIN."""
    loader, seen = place.reader(**changes).loader(open_release(place.url)), Seen()
    for step, batch in loader.batches(0, place.steps.stop):
        seen.add(step, batch)
        if step == BEGIN:
            happens()
    seen.stats, seen.left_out = loader.stats(), loader.left_out
    return seen


def fails(place: Place, happens: Callable[[], object], kind: type[DrafError]) -> tuple[DrafError, Seen, float]:
    """The error that an epoch ends with, what came before it, and how long after the event it came."""
    seen, begun = Seen(), time.monotonic()
    try:
        for step, batch in place.reader().loader(open_release(place.url)).batches(0, place.steps.stop):
            seen.add(step, batch)
            if step == BEGIN:
                happens()
                begun = time.monotonic()
    except kind as error:
        return error, seen, time.monotonic() - begun
    raise AssertionError(f"no {kind.__name__}")


STORMS: dict[str, Callable[[FaultServer], object]] = {
    "503 bursts": lambda faults: [faults.next(503, times=30), faults.next(503, times=None, share=0.1)],
    "500s": lambda faults: faults.next(500, times=8),
    "resets": lambda faults: [faults.reset(times=6), faults.reset(after_bytes=1000, times=4)],
    "short bodies": lambda faults: [faults.cut(after_bytes=1000, times=4), faults.shorten(to_bytes=1000, times=4)],
    "stalls": lambda faults: [faults.stall(4, times=2), faults.stall(4, after_bytes=1000, times=2)],
}


def drawn_at(place: Place, step: int, modality: str) -> tuple[str, int, int, str]:
    """Of a sample of a step that has the modality: its shard, a byte of that member, its uid, the member's name."""
    reader = ShardReader(place.local, "train")
    draws = place.reader().order(place.local).draws(step).sample
    for shard, row in zip(*reader.locate(np.sort(draws)), strict=True):
        index = reader.index(int(shard))
        member = index.member(int(row), modality)
        if member is not None and index.present[int(row)].sum() > 1:
            uid = int(index.uids[row])
            return reader.shards[int(shard)].sha256, member.offset + member.size - 2, uid, f"{uid_name(uid)}.{modality}."
    raise AssertionError("no such sample")


def barely(place: Place) -> Reader:
    """A reader whose cache has 1.25 times the working set, which is at most a quarter of the data."""
    reader = Reader(place.url, place.cache, batch_size=8, groups=4, open_samples=32)
    sizes = [[shard.size_bytes for shard in place.local.shards("train")]]
    needed = working_set(reader.order(place.local), sizes, block_bytes=BLOCK_BYTES, ahead_steps=reach(reader.prefetch))
    assert len(sizes[0]) >= 400
    assert needed <= sum(sizes[0]) / 4
    return replace(reader, limit_bytes=needed * 5 // 4)


def fetched_once_an_epoch(place: Place, reader: Reader, seen: Seen, epochs: int) -> None:
    steps = reader.order(place.local).steps_per_epoch
    for epoch in range(epochs):
        assert seen.receipt(range(epoch * steps, (epoch + 1) * steps)) == place.local.manifest.receipts["train"]
    expected = read(replace(reader, world=1), place.local, range(epochs * steps))
    assert all(seen.global_batch(step) == expected.global_batch(step) for step in range(epochs * steps))
    data = sum(shard.size_bytes for shard in place.local.shards("train"))
    assert 0.9 * epochs * data < place.faults.num_bytes(key=".tar") <= 1.1 * epochs * data
    assert NodeCache(reader.cache, reader.limit_bytes).size_bytes <= reader.limit_bytes


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "fetch", "plan", "patch"))]
