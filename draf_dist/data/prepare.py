"""A source to a release: `draf prepare`.

Everything a release consists of is written before HEAD.json names it, under names that follow from the content. So a run that dies
at any moment leaves nothing that could be taken for a release, and the next run finds and reuses the shards that were complete.
"""

import hashlib
import hmac
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from draf_dist.data.gather import Gathered, Progress, Row, Spool, gather
from draf_dist.data.receipts import receipt
from draf_dist.data.release import (
    HEAD,
    SUBJECTS_SCHEMA,
    Release,
    dangling,
    index_path,
    load_manifest,
    load_release,
    load_subjects,
    read_head,
    release_path,
    split_version,
    tar_path,
    version_of,
)
from draf_dist.data.shards import ShardWriter, cut, encode_index, extension, index_tar, sha256_of
from draf_dist.data.splits import SplitRule, StudyRow, assign_splits, component_of
from draf_dist.data.stats import StatsBuilder, decode_member
from draf_dist.errors import GateError, SpecError, explain
from draf_dist.schema.modality import DataSchema, Record
from draf_dist.schema.release import SPLITS, Head, Quarantine, ReleaseManifest, ReleaseStats, ShardRecord, Split
from draf_dist.sources.base import Source
from draf_dist.storage import MissingError, Store, open_store, room_on

QUARANTINE_LIMIT = 0.05
SHARD_BYTES = 32 * 2**20
Counts = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True)
class Inspection:
    """What `prepare` would write. counts as in ReleaseManifest."""

    counts: Counts
    quarantine: Quarantine


@dataclass(frozen=True)
class _Parent:
    """The release that the new one follows: its record of splits goes on. etag: of HEAD.json when the run began."""

    version: str | None = None
    etag: str | None = None
    assigned: Mapping[str, Split] | None = None


def prepare(
    source: Source,
    url: str,
    *,
    subject_key: bytes,
    limit: float = QUARANTINE_LIMIT,
    shard_size_bytes: int = SHARD_BYTES,
    on_progress: Progress = lambda done, total: None,
    rule: SplitRule = assign_splits,
) -> Release:
    """Writes the source as a release of the data set at `url` and makes it the newest one.

    The same source, key and earlier releases give the same version and the same bytes (with the same versions of the libraries
    that encode). Memory holds one record a study and one shard; local temporary disk holds one encoded copy.

    Args:
        source: what to read.
        url: local path, file:// or s3:// URL of the data set, without a version.
        subject_key: the secret under which subjects become pseudonyms.
        limit: share of studies that may go to quarantine.
        shard_size_bytes: a shard is cut before it would be larger.
        on_progress: called with (studies read, None), then with (studies written, all studies).
        rule: which split a subject goes to.

    Raises:
        SpecError: the URL, its bucket, or another data set at that URL.
        DataError: too many unusable studies, one image under two subjects, or an export that does not fit its card.
        GateError: another key than that of the earlier release, or another run that published meanwhile.
        StorageFullError, UnreachableError: no room in the store or on the temporary disk; no answer, or refused.
    """
    url = _unversioned(url)
    store = open_store(url)
    parent = _find_parent(store, url, source, subject_key)
    with _gathered(source, subject_key, limit, on_progress) as (folder, spool, gathered):
        splits = _splits(gathered, source, parent, rule)
        by_split = {split: [row for row in gathered.rows if splits[component_of(row.subject)] == split] for split in SPLITS}
        stats = _stats(spool, by_split["train"], source.schema)
        shards = _write_shards(store, spool, by_split, folder, source.schema, shard_size_bytes, on_progress)
    parts = _parts(source, stats, _subjects_table(gathered.rows, splits, source.schema), gathered.quarantine(limit))
    manifest = _manifest(source, parts, parent, subject_key, by_split, gathered, shards)
    return _publish(store, url, manifest, parts, parent)


def inspect_source(
    source: Source,
    url: str | None = None,
    *,
    subject_key: bytes,
    limit: float = QUARANTINE_LIMIT,
    on_progress: Progress = lambda done, total: None,
) -> Inspection:
    """Reads and checks everything as `prepare` to this URL does, and writes nothing; raises what `prepare` would.

    Without a URL, as for a data set that has no release yet.
    """
    parent = _Parent()
    if url is not None:
        url = _unversioned(url)
        parent = _find_parent(open_store(url), url, source, subject_key)
    with _gathered(source, subject_key, limit, on_progress) as (_, _, gathered):
        splits = _splits(gathered, source, parent, assign_splits)
    by_split = {split: [row for row in gathered.rows if splits[component_of(row.subject)] == split] for split in SPLITS}
    return Inspection(_counts(source.schema, by_split), gathered.quarantine(limit))


@contextmanager
def _gathered(source: Source, subject_key: bytes, limit: float, on_progress: Progress) -> Iterator[tuple[Path, Spool, Gathered]]:
    """A temporary folder, the spool in it, and what was read; gone at the end, also after an error."""
    with tempfile.TemporaryDirectory(prefix="draf-prepare-") as name:
        folder = Path(name)
        with room_on(folder), closing(Spool(folder / "spool")) as spool:
            yield folder, spool, gather(source, spool, subject_key=subject_key, limit=limit, on_progress=on_progress)


def key_check(subject_key: bytes) -> str:
    """Names the key without giving it away: 16 hex digits."""
    return hmac.new(subject_key, b"draf_dist: which subject key", hashlib.sha256).hexdigest()[:16]


def _unversioned(url: str) -> str:
    base, version = split_version(url)
    if version is not None:
        remedy = f"Name the data set: {base}"
        raise SpecError(explain(url, expected="a URL without a version", found=f"@{version}", remedy=remedy))
    return base


def _find_parent(store: Store, url: str, source: Source, subject_key: bytes) -> _Parent:
    head = read_head(store)
    if head is None:
        return _Parent()
    # The small files are left unread: one that is lost or broken is to be written again by this very run.
    try:
        manifest = load_manifest(store, head[0].version)
    except MissingError as error:
        raise dangling(store, head[0]) from error
    if manifest.name != source.name:
        remedy = "Prepare to another URL."
        raise SpecError(explain(url, expected=f"releases of {source.name!r}", found=f"of {manifest.name!r}", remedy=remedy))
    if manifest.subject_key_check != key_check(subject_key):
        raise GateError(
            explain(
                "DRAF_SUBJECT_KEY",
                expected=f"the key of release {manifest.version}",
                found="another one, under which the same subjects would be split anew",
                remedy="Use that key. If it is lost, prepare to a new URL: its splits have nothing in common with the old ones.",
            )
        )
    table = load_subjects(store, manifest).select(["component", "split"]).to_pydict()
    return _Parent(manifest.version, head[1], dict(zip(table["component"], table["split"], strict=True)))


def _splits(gathered: Gathered, source: Source, parent: _Parent, rule: SplitRule) -> dict[str, Split]:
    studies = [StudyRow(row.subject, row.site, row.label) for row in gathered.rows]
    return rule(studies, held_out_sites=source.held_out_sites, assigned=parent.assigned)


def _stats(spool: Spool, rows: Sequence[Row], schema: DataSchema) -> ReleaseStats:
    builder = StatsBuilder(schema)
    for row in rows:
        members = spool.read(row)
        builder.add({s.name: decode_member(members[extension(s)], s) for s in schema.modalities if s.name in row.present})
    return builder.result()


def _write_shards(
    store: Store,
    spool: Spool,
    by_split: Mapping[Split, Sequence[Row]],
    folder: Path,
    schema: DataSchema,
    shard_size_bytes: int,
    on_progress: Progress,
) -> tuple[ShardRecord, ...]:
    shards: list[ShardRecord] = []
    done, total = 0, sum(len(rows) for rows in by_split.values())
    for split, rows in by_split.items():
        for part in cut([row.tar_bytes for row in rows], shard_size_bytes):
            shards.append(_write_shard(store, spool, rows[part], split, folder / "shard", schema))
            done += shards[-1].num_samples
            on_progress(done, total)
    return tuple(shards)


def _write_shard(store: Store, spool: Spool, rows: Sequence[Row], split: Split, local: Path, schema: DataSchema) -> ShardRecord:
    with ShardWriter(local) as writer:
        for row in rows:
            writer.write(row.uid, spool.read(row))
    index = encode_index(index_tar(local, schema))
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


def _subjects_table(rows: Sequence[Row], splits: Mapping[str, Split], schema: DataSchema) -> bytes:
    """subjects.parquet: one row a study, in the order of uids."""
    table = pa.table(
        {
            "subject": [row.subject for row in rows],
            "site": [row.site for row in rows],
            "split": [splits[component_of(row.subject)] for row in rows],
            "component": [component_of(row.subject) for row in rows],
            "uid": [row.uid for row in rows],
            "label": [schema.label.classes[row.label] for row in rows],
        },
        schema=SUBJECTS_SCHEMA,
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _parts(source: Source, stats: ReleaseStats, subjects: bytes, quarantine: Quarantine) -> dict[str, bytes]:
    """The files of a release but for release.json, by name."""
    return {
        "schema.json": _json(source.schema),
        "stats.json": _json(stats),
        "subjects.parquet": subjects,
        "quarantine.json": _json(quarantine),
    }


def _json(record: Record) -> bytes:
    return record.model_dump_json(indent=2).encode() + b"\n"


def _manifest(
    source: Source,
    parts: Mapping[str, bytes],
    parent: _Parent,
    subject_key: bytes,
    by_split: Mapping[Split, Sequence[Row]],
    gathered: Gathered,
    shards: tuple[ShardRecord, ...],
) -> ReleaseManifest:
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    draft = ReleaseManifest(
        version="",
        name=source.name,
        parent=parent.version,
        schema_sha256=digests["schema.json"],
        stats_sha256=digests["stats.json"],
        subjects_sha256=digests["subjects.parquet"],
        quarantine_sha256=digests["quarantine.json"],
        card_sha256=source.card_sha256,
        subject_key_check=key_check(subject_key),
        held_out_sites=tuple(sorted(source.held_out_sites)),
        counts=_counts(source.schema, by_split),
        quarantined=gathered.quarantine(1.0).reasons,
        receipts={split: receipt(np.array([row.uid for row in rows], dtype=np.int64)) for split, rows in by_split.items()},
        shards=shards,
    )
    return draft.model_copy(update={"version": version_of(draft)})


def _counts(schema: DataSchema, by_split: Mapping[Split, Sequence[Row]]) -> Counts:
    """Site -> split -> {"studies": n, "<modality>": n present}, zeros included."""
    counts: Counts = {site: {split: dict.fromkeys(("studies", *schema.names), 0) for split in SPLITS} for site in schema.sites}
    for split, rows in by_split.items():
        for row in rows:
            for name in ("studies", *row.present):
                counts[row.site][split][name] += 1
    return counts


def _publish(store: Store, url: str, manifest: ReleaseManifest, parts: Mapping[str, bytes], parent: _Parent) -> Release:
    """Writes the small files, release.json last of them, and moves HEAD.json from the parent to this version."""
    version, last = manifest.version, release_path(manifest.version, "release.json")
    for name, data in parts.items():
        if store.size(release_path(version, name)) != len(data):
            store.write(release_path(version, name), data)
    store.create(last, _json(manifest))
    if version != parent.version:
        head = _json(Head(version=version))
        moved = store.create(HEAD, head) if parent.etag is None else store.swap(HEAD, head, parent.etag)
        now = None if moved else read_head(store)
        if now is not None and now[0].version != version:
            raise GateError(
                explain(
                    store.where(HEAD),
                    expected=f"version {parent.version or '(none)'}, on which this run builds",
                    found=f"{now[0].version}: another run published it meanwhile",
                    remedy="Run the same command again: it will build on that release.",
                )
            )
    return load_release(url, store, version)
