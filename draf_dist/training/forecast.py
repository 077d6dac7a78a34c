"""What a job will read, before it reads: steps, rows, shuffle quality, working set, requests (docs/planning.md)."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from draf_dist.data.loader import Reading
from draf_dist.data.order import Order, rank_entries
from draf_dist.data.patch_reads import most_read
from draf_dist.data.permutation import IntArray
from draf_dist.data.pipeline import reach
from draf_dist.data.release import Release
from draf_dist.data.remote_shards import BLOCK_BYTES
from draf_dist.data.shards import ShardIndex
from draf_dist.data.shuffle_quality import MAX_BATCHES, steps_to_measure, variance_ratio
from draf_dist.data.working_set import Fetch, epoch_fetch, open_blocks, step_fetch
from draf_dist.schema.modality import VolumeSpec
from draf_dist.schema.release import ShardRecord
from draf_dist.training.plan import Source, TrainingPlan

# Of a release with more shards the quality is measured on fewer batches, so that no more indexes are read than this.
MAX_INDEXES = 4096
INDEX_READERS = 8
FEWEST_BATCHES = 8
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SourceForecast:
    """One source of the plan. per epoch of its own: num_samples, read_bytes, blocks, which is the most requests.

    volumes: the most bytes and requests (as blocks) of its patches, which come on top. share: of a batch, in samples. window:
    samples of a group that are shuffled together. site_quality, label_quality: variance over that of a full shuffle, on
    quality_batches batches; None where there is only one kind, or no full batch.
    """

    name: str
    num_samples: int
    num_shards: int
    read_bytes: int
    blocks: int
    volumes: Fetch
    share: int
    groups: int
    window: int
    working_set_bytes: int
    site_quality: float | None
    label_quality: float | None
    quality_batches: int


@dataclass(frozen=True)
class Forecast:
    """What every rank and the node's cache will meet.

    epoch_bytes, epoch_blocks: of all sources in the steps between two validations, each block fetched once in an epoch of its
    source. working_set_bytes, working_set_blocks: of what training has open at once, an upper bound; validation_bytes: of what
    validation has besides; needed_bytes: both, which a run asks of the cache. order_bytes: memory of the order in a process.
    epoch_volumes, step_volumes: the most bytes and requests (as blocks) of patches, which no cache keeps.
    """

    batch_size: int
    steps_per_epoch: int
    last_batch: int
    world: int
    rows: tuple[int, int]
    imbalance: float
    block_bytes: int
    ahead_steps: int
    working_set_bytes: int
    working_set_blocks: int
    validation_bytes: int
    needed_bytes: int
    epoch_bytes: int
    epoch_blocks: int
    first_batch_bytes: int
    first_batch_blocks: int
    epoch_volumes: Fetch
    step_volumes: Fetch
    order_bytes: int
    sources: tuple[SourceForecast, ...]


def forecast(plan: TrainingPlan, world: int = 1, on_progress: Progress = lambda done, total: None) -> Forecast:
    """What following a plan on so many ranks takes.

    on_progress is called with (indexes read, all that are read).

    Raises:
        SpecError: more ranks than samples in a batch.
        DataError, UnreachableError: an index that is broken, or can't be read.
    """
    order = plan.order
    rows = _rows(order.batch_size, world)
    shard_bytes = [[shard.size_bytes for shard in source.release.shards("train")] for source in plan.sources]
    ahead = reach(Reading().prefetch)
    held = open_blocks(order, shard_bytes, block_bytes=BLOCK_BYTES, ahead_steps=ahead)
    first = step_fetch(order, shard_bytes, block_bytes=BLOCK_BYTES)
    sources = tuple(
        _source(source, part, held.by_source[number], on_progress)
        for number, (source, part) in enumerate(zip(plan.sources, order.cut_orders, strict=True))
    )
    epochs = [drawn / source.num_samples for drawn, source in zip(order.num_drawn(order.steps_per_epoch), sources, strict=True)]
    return Forecast(
        batch_size=order.batch_size,
        steps_per_epoch=order.steps_per_epoch,
        last_batch=plan.num_entries(order.steps_per_epoch - 1),
        world=world,
        rows=(min(rows), max(rows)),
        imbalance=max(rows) * world / order.batch_size - 1,
        block_bytes=BLOCK_BYTES,
        ahead_steps=ahead,
        working_set_bytes=held.bytes,
        working_set_blocks=held.blocks,
        validation_bytes=plan.validation_bytes,
        needed_bytes=held.bytes + plan.validation_bytes,
        epoch_bytes=round(sum(source.read_bytes * times for source, times in zip(sources, epochs, strict=True))),
        epoch_blocks=round(sum(source.blocks * times for source, times in zip(sources, epochs, strict=True))),
        first_batch_bytes=first.bytes,
        first_batch_blocks=first.blocks,
        epoch_volumes=_times([source.volumes for source in sources], epochs),
        step_volumes=_times([_of_a_sample(plan.release)], [order.batch_size]),
        order_bytes=sum(part.memory_bytes for part in order.cut_orders),
        sources=sources,
    )


def _rows(batch_size: int, world: int) -> list[int]:
    entries = [rank_entries(batch_size, batch_size, rank, world) for rank in range(max(world, 1))]
    return [part.stop - part.start for part in entries]


def _source(source: Source, order: Order, working_set_bytes: int, on_progress: Progress) -> SourceForecast:
    shards = source.release.shards("train")
    fetch = epoch_fetch([shard.num_samples for shard in shards], [shard.size_bytes for shard in shards], BLOCK_BYTES)
    site, label, num_batches = _qualities(source.release, order, on_progress)
    windows = order.horizon(0, 0).groups.window
    return SourceForecast(
        name=source.name,
        num_samples=order.num_samples,
        num_shards=len(shards),
        read_bytes=fetch.bytes,
        blocks=fetch.blocks,
        volumes=_volumes(source.release, order.num_samples),
        share=order.batch_size,
        groups=order.num_groups,
        window=int(windows.max()),
        working_set_bytes=working_set_bytes,
        site_quality=site,
        label_quality=label,
        quality_batches=num_batches,
    )


def _volumes(release: Release, num_samples: int) -> Fetch:
    """What the patches of so many training samples take at most. Of a view of a release it is known how many samples it has."""
    reads = [(spec.name, most_read(spec)) for spec in release.schema.modalities if isinstance(spec, VolumeSpec)]
    present = [min(num_samples, sum(site["train"][name] for site in release.manifest.counts.values())) for name, _ in reads]
    return _times([read for _, read in reads], present)


def _of_a_sample(release: Release) -> Fetch:
    reads = [most_read(spec) for spec in release.schema.modalities if isinstance(spec, VolumeSpec)]
    return _times(reads, [1] * len(reads))


def _times(reads: Sequence[Fetch], times: Sequence[float]) -> Fetch:
    pairs = list(zip(reads, times, strict=True))
    return Fetch(math.ceil(sum(read.bytes * n for read, n in pairs)), math.ceil(sum(read.blocks * n for read, n in pairs)))


def _qualities(release: Release, order: Order, on_progress: Progress) -> tuple[float | None, float | None, int]:
    """Of site and label, and the number of batches that they were measured on."""
    shards = release.shards("train")
    most = MAX_BATCHES if len(shards) <= MAX_INDEXES else min(MAX_BATCHES, max(FEWEST_BATCHES, MAX_INDEXES // order.batch_size))
    steps = steps_to_measure(order, most)
    if not steps or order.num_samples == order.batch_size:
        return None, None, 0
    drawn = np.stack([order.draws(step).sample for step in steps])
    line = order.horizon(0, 0).line
    touched = np.unique(np.searchsorted(line.manifest_ends, drawn, side="right"))
    samples, categories = _categories(release, [shards[number] for number in touched], on_progress)
    starts = (line.manifest_ends - [shard.num_samples for shard in shards])[touched]
    known = np.concatenate([start + np.arange(number) for start, number in zip(starts, samples, strict=True)])
    at = np.searchsorted(known, drawn)
    measured = [_quality(category[at], category, order.num_samples) for category in categories]
    return measured[0], measured[1], len(steps)


def _quality(batches: IntArray, category: IntArray, num_samples: int) -> float | None:
    counts = np.bincount(category)
    return variance_ratio(batches, counts, num_samples) if (counts > 0).sum() > 1 else None


def _categories(release: Release, shards: list[ShardRecord], on_progress: Progress) -> tuple[list[int], list[IntArray]]:
    """Samples of each shard; site and label of all of them as numbers from 0."""
    with ThreadPoolExecutor(INDEX_READERS) as pool:
        indexes = []
        for index in pool.map(release.index, shards):
            indexes.append(index)
            on_progress(len(indexes), len(shards))
    return [index.num_samples for index in indexes], [_numbered(release, indexes, "site"), _numbered(release, indexes, "label")]


def _numbered(release: Release, indexes: list[ShardIndex], column: str) -> IntArray:
    # The index of a foreign tar says it; of what is our own, subjects.parquet does.
    said = [index.sites if column == "site" else index.labels for index in indexes]
    known = [values for values in said if values is not None]
    if len(known) == len(said):
        return np.concatenate(known)
    subjects = release.subjects()
    uids = subjects["uid"].to_numpy()
    _, numbers = np.unique(subjects[column].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    by_uid = np.argsort(uids, kind="stable")
    rows = np.searchsorted(uids[by_uid], np.concatenate([index.uids for index in indexes]))
    return numbers[by_uid][rows].astype(np.int64)
