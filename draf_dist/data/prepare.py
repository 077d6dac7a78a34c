"""A source to a release: `draf prepare`.

Everything a release consists of is written before HEAD.json names it, under names that follow from the content. So a run that dies
at any moment leaves nothing that could be taken for a release, and the next run finds and reuses the shards that were complete.
"""

from dataclasses import dataclass

from draf_dist.data.gather import Gathered, Progress
from draf_dist.data.pack import SHARD_BYTES, Packing, RowsBySplit, by_split, gathered, training_statistics, write_shards
from draf_dist.data.parent import Parent, find_parent, key_check, unversioned
from draf_dist.data.parts import Counts, Parts, count, encode_parts, finished, part_digests, receipts, subjects_table
from draf_dist.data.publish import move_head, write_release
from draf_dist.data.release import Release, lineage, load_release
from draf_dist.data.splits import SplitRule, StudyRow, assign_splits
from draf_dist.errors import GateError, explain
from draf_dist.schema.release import Quarantine, ReleaseManifest, ShardRecord, Split
from draf_dist.sources.base import Described, Source
from draf_dist.storage import Store, open_store

QUARANTINE_LIMIT = 0.05


@dataclass(frozen=True)
class Inspection:
    """What `prepare` would write. counts as in ReleaseManifest."""

    counts: Counts
    quarantine: Quarantine


def prepare(
    source: Source,
    url: str,
    *,
    subject_key: bytes,
    limit: float = QUARANTINE_LIMIT,
    shard_size_bytes: int = SHARD_BYTES,
    jobs: int = 1,
    on_progress: Progress = lambda done, total: None,
    rule: SplitRule = assign_splits,
) -> Release:
    """Writes the source as a release of the data set at `url` and makes it the newest one.

    The same source, key and earlier releases give the same version and the same bytes (with the same versions of the libraries
    that encode). Memory holds one record a study and one shard; local temporary disk holds one encoded copy. Where deliveries
    were added to this very version, they stay: the newest release is left as it is.

    Args:
        source: what to read.
        url: local path, file:// or s3:// URL of the data set, without a version.
        subject_key: the secret under which subjects become pseudonyms.
        limit: share of studies that may go to quarantine.
        shard_size_bytes: a shard is cut before it would be larger.
        jobs: how many studies are encoded, and shards written, at once.
        on_progress: called with (studies read, None), then with (studies written, all studies).
        rule: which split a subject goes to.

    Raises:
        SpecError: the URL, its bucket, or another data set at that URL.
        DataError: too many unusable studies, one image under two subjects, or an export that does not fit its card.
        GateError: another key than that of the earlier release, another run that published meanwhile, or another export where
            deliveries would be lost.
        StorageFullError, UnreachableError: no room in the store or on the temporary disk; no answer, or refused.
    """
    url = unversioned(url)
    store = open_store(url)
    parent = find_parent(store, url, source.name, subject_key)
    with gathered(source, subject_key, limit, on_progress, jobs) as (folder, spool, found):
        splits = splits_of(found, source, parent, rule)
        rows = by_split(found.rows, splits)
        stats = training_statistics(spool, rows["train"], source.schema, jobs=jobs).result()
        shards = write_shards(Packing(store, spool, folder, source.schema, shard_size_bytes, jobs), rows, on_progress)
    parts = encode_parts(source.schema, stats, subjects_table(found.rows, splits), found.quarantine(limit))
    manifest = manifest_of(source, parts, parent, key_check(subject_key), rows, found, shards)
    return publish(store, url, manifest, parts, parent)


def inspect_source(
    source: Source,
    url: str | None = None,
    *,
    subject_key: bytes,
    limit: float = QUARANTINE_LIMIT,
    jobs: int = 1,
    on_progress: Progress = lambda done, total: None,
) -> Inspection:
    """Reads and checks everything as `prepare` to this URL does, and writes nothing; raises what `prepare` would.

    Without a URL, as for a data set that has no release yet.
    """
    parent = Parent()
    if url is not None:
        url = unversioned(url)
        parent = find_parent(open_store(url), url, source.name, subject_key)
    with gathered(source, subject_key, limit, on_progress, jobs) as (_, _, found):
        splits = splits_of(found, source, parent, assign_splits)
    return Inspection(count(source.schema, by_split(found.rows, splits)), found.quarantine(limit))


def splits_of(found: Gathered, source: Described, parent: Parent, rule: SplitRule) -> dict[str, Split]:
    """Component -> split."""
    studies = [StudyRow(row.subject, row.site, row.stratum) for row in found.rows]
    return rule(studies, held_out_sites=source.held_out_sites, assigned=parent.assigned)


def manifest_of(
    source: Described,
    parts: Parts,
    parent: Parent,
    subject_key_check: str,
    rows: RowsBySplit,
    found: Gathered,
    shards: tuple[ShardRecord, ...],
) -> ReleaseManifest:
    """The manifest, with its version."""
    return finished(
        ReleaseManifest(
            version="",
            name=source.name,
            parent=parent.version,
            **part_digests(parts),
            card_sha256=source.card_sha256,
            subject_key_check=subject_key_check,
            held_out_sites=tuple(sorted(source.held_out_sites)),
            counts=count(source.schema, rows),
            quarantined=found.quarantine(1.0).reasons,
            receipts=receipts(rows),
            shards=shards,
        )
    )


def publish(store: Store, url: str, manifest: ReleaseManifest, parts: Parts, parent: Parent) -> Release:
    """Completes the version and makes it the newest one, unless deliveries came to it since.

    Raises:
        GateError: their studies would be lost, or another run published meanwhile.
    """
    delivered = parent.manifest.deliveries if parent.manifest is not None else ()
    version = manifest.version
    if delivered and parent.manifest is not None and version not in lineage(store, parent.manifest):
        raise GateError(
            explain(
                url,
                expected=f"the export of release {parent.version}, before deliveries came",
                found=f"another one, in whose release the studies of {len(delivered)} deliveries would be missing",
                remedy="Add it with draf ingest, or prepare to another URL and ingest the deliveries there again.",
            )
        )
    write_release(store, manifest, parts)
    if not delivered:
        move_head(store, version, parent)
    return load_release(url, store, version)
