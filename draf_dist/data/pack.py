"""From the spool to the store: a source read into it, statistics of the training rows, shards under the names of their content."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from draf_dist.data.gather import Gathered, Progress, Row, Spool, gather
from draf_dist.data.in_order import in_order
from draf_dist.data.release import index_path, tar_path
from draf_dist.data.shards import ShardWriter, cut, encode_index, extension, index_tar, sha256_of
from draf_dist.data.splits import component_of
from draf_dist.data.stats import Inputs, StatsBuilder, decode_member
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.release import SPLITS, ShardRecord, Split, TrainingSums
from draf_dist.sources.base import Source
from draf_dist.storage import Store, room_on

SHARD_BYTES = 32 * 2**20
RowsBySplit = Mapping[Split, Sequence[Row]]


@dataclass(frozen=True)
class Packing:
    """Where shards go. folder: local, for shards while they are written, `jobs` at once. schema: the order of the modalities."""

    store: Store
    spool: Spool
    folder: Path
    schema: DataSchema
    shard_size_bytes: int
    jobs: int = 1


@contextmanager
def gathered(
    source: Source, subject_key: bytes, limit: float, on_progress: Progress, jobs: int = 1
) -> Iterator[tuple[Path, Spool, Gathered]]:
    """A temporary folder, the spool in it, and what was read; gone at the end, also after an error.

    Raises:
        DataError: see `gather`.
        StorageFullError: the temporary disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="draf-prepare-") as name:
        folder = Path(name)
        with room_on(folder), closing(Spool(folder / "spool")) as spool:
            yield folder, spool, gather(source, spool, subject_key=subject_key, limit=limit, on_progress=on_progress, jobs=jobs)


def by_split(rows: Sequence[Row], splits: Mapping[str, Split]) -> dict[Split, list[Row]]:
    """The rows of every split, in the order given. splits: component -> split."""
    return {split: [row for row in rows if splits[component_of(row.subject)] == split] for split in SPLITS}


def training_statistics(
    spool: Spool, rows: Sequence[Row], schema: DataSchema, start: TrainingSums | None = None, *, jobs: int = 1
) -> StatsBuilder:
    """The statistics of the training rows, on top of what came before."""
    builder = StatsBuilder(schema, start)

    def decode(row: Row) -> Inputs:
        members = spool.read(row)
        return {s.name: decode_member(members[extension(s)], s) for s in schema.modalities if s.name in row.present}

    for _, inputs in in_order(rows, decode, jobs):
        builder.add(inputs())
    return builder


def write_shards(packing: Packing, rows_by_split: RowsBySplit, on_progress: Progress) -> tuple[ShardRecord, ...]:
    """The rows as shards in the store, split by split; those that are there already are left as they are.

    on_progress is called with (studies written, all studies).
    """
    shards: list[ShardRecord] = []
    done, total = 0, sum(len(rows) for rows in rows_by_split.values())
    parts = (
        (split, rows[part])
        for split, rows in rows_by_split.items()
        for part in cut([row.tar_bytes for row in rows], packing.shard_size_bytes)
    )
    for _, written in in_order(parts, lambda part: _write_shard(packing, part[1], part[0]), packing.jobs):
        shards.append(written())
        done += shards[-1].num_samples
        on_progress(done, total)
    return tuple(shards)


def _write_shard(packing: Packing, rows: Sequence[Row], split: Split) -> ShardRecord:
    store, local = packing.store, packing.folder / f"shard-{split}-{rows[0].uid}"
    with ShardWriter(local) as writer:
        for row in rows:
            _write_objects(packing, row)
            writer.write(row.uid, packing.spool.read(row))
    index = encode_index(index_tar(local, packing.schema))
    shard = ShardRecord(
        split=split,
        sha256=sha256_of(local),
        size_bytes=local.stat().st_size,
        index_sha256=hashlib.sha256(index).hexdigest(),
        num_samples=len(rows),
    )
    # An earlier run, or an earlier release, may have written the same content.
    if store.size(tar_path(shard)) != shard.size_bytes:
        store.upload(tar_path(shard), local)
    if store.size(index_path(shard)) != len(index):
        store.write(index_path(shard), index)
    local.unlink()
    return shard


def _write_objects(packing: Packing, row: Row) -> None:
    """What a study has beside the shards; before the shard that points to it. Names follow from the content, as those of shards."""
    for path, size in row.objects:
        if packing.store.size(path) != size:
            packing.store.write(path, packing.spool.read_object(row, path))
