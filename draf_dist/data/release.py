"""A release, read: one immutable, content-addressed version of a data set at a URL."""

import difflib
import hashlib
import json
import posixpath
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pydantic import ValidationError

from draf_dist.config.spec import canonical_json
from draf_dist.data.shards import ShardIndex, decode_index
from draf_dist.errors import DataError, SpecError, explain
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.record import Record
from draf_dist.schema.release import Head, Quarantine, ReleaseManifest, ReleaseStats, ShardRecord, Split, TrainingSums
from draf_dist.storage import MissingError, Store, open_store
from draf_dist.storage.parquet import read_parquet

HEAD = "HEAD.json"
RELEASES = "releases"
SUBJECTS_SCHEMA = pa.schema(
    [
        pa.field("subject", pa.string(), nullable=False),
        pa.field("site", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("component", pa.string(), nullable=False),
        pa.field("uid", pa.int64(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
    ]
)
RESTORE = "Restore the file from a copy."
CHANGED = "If it was changed on purpose, run draf prepare again; else restore it."
REWRITE = "Restore the file from a copy, or delete it and run draf prepare again on the same export: it writes what is missing."
RecordT = TypeVar("RecordT", bound=Record)


@dataclass(frozen=True)
class Release:
    """One pinned version. url is that of the data set, without the version; reading is safe from several threads."""

    url: str
    version: str
    store: Store
    manifest: ReleaseManifest
    schema: DataSchema
    stats: ReleaseStats
    # Of folders with foreign tars, by URL. Two threads may open one twice; the first one stays.
    _tar_stores: dict[str, Store] = field(default_factory=dict, repr=False, compare=False)

    @property
    def pinned_url(self) -> str:
        """The URL that names this version for ever."""
        return f"{self.url}@{self.version}"

    def shards(self, split: Split) -> tuple[ShardRecord, ...]:
        """The shards of a split, in manifest order."""
        return tuple(shard for shard in self.manifest.shards if shard.split == split)

    def index(self, shard: ShardRecord) -> ShardIndex:
        """Where the members of a shard are.

        Raises:
            DataError: the index is not there or not the one that the manifest names.
        """
        path = index_path(shard)
        data = _read_checked(self.store, path, shard.index_sha256)
        try:
            return self._fitting(decode_index(data, self.schema.stored_names), shard)
        except ValueError as error:
            where = self.store.where(path)
            raise DataError(explain(where, expected="an index", found=str(error), remedy=REWRITE)) from error

    def tar_location(self, shard: ShardRecord) -> tuple[Store, str]:
        """The store and the path in it at which a shard's tar lies, its own or a foreign one.

        Raises:
            SpecError: the folder or bucket of a foreign tar does not exist.
            UnreachableError: its store does not answer, or refuses the credentials.
        """
        if shard.url is None:
            return self.store, tar_path(shard)
        folder, _, name = resolved(self.store.url, shard.url).rpartition("/")
        if folder not in self._tar_stores:
            self._tar_stores.setdefault(folder, open_store(folder or "/"))
        return self._tar_stores[folder], name

    def apart(self, split: Split) -> "Release":
        """The same release through stores that count what is asked through it alone (see Store.apart).

        Raises as `tar_location` of the shards of the split.
        """
        for shard in self.shards(split):
            self.tar_location(shard)
        return replace(self, store=self.store.apart(), _tar_stores={url: store.apart() for url, store in self._tar_stores.items()})

    def where_tar(self, shard: ShardRecord) -> str:
        """The URL of a shard's tar, for messages; opens no store."""
        return self.store.where(tar_path(shard)) if shard.url is None else resolved(self.store.url, shard.url)

    def _fitting(self, index: ShardIndex, shard: ShardRecord) -> ShardIndex:
        if index.is_foreign != (shard.url is not None):
            raise ValueError("one of another kind of shard")
        if index.sites is None or index.labels is None or not index.num_samples:
            return index
        if index.sites.max() >= len(self.schema.sites) or index.labels.max() >= len(self.schema.classes):
            raise ValueError("a site or label that schema.json does not have")
        return index

    def subjects(self) -> pa.Table:
        """Every study: subject (pseudonym), site, split, component, uid, label; in the order of uids."""
        return load_subjects(self.store, self.manifest)

    def quarantine(self) -> Quarantine:
        """What was left out and why."""
        path = release_path(self.version, "quarantine.json")
        return _parse(Quarantine, _read_checked(self.store, path, self.manifest.quarantine_sha256), self.store.where(path))

    def sums(self) -> TrainingSums | None:
        """What the statistics follow from; None for a release that stores none (one made by `draf prepare`)."""
        sha256 = self.manifest.sums_sha256
        return None if sha256 is None else _read_part(self.store, self.version, "sums.json", sha256, TrainingSums)


@dataclass(frozen=True)
class LogEntry:
    """One line of the history of a data set. is_head: what a URL without a version means now.

    deliveries: the ids of those that this version added to its parent.
    """

    version: str
    parent: str | None
    is_head: bool
    num_studies: dict[str, int]
    num_quarantined: int
    deliveries: tuple[str, ...]


def tar_path(shard: ShardRecord) -> str:
    """Where a shard of our own lies in the release's store; see Release.tar_location."""
    return f"shards/{shard.split}/{shard.sha256}.tar"


def index_path(shard: ShardRecord) -> str:
    """Where the index of a shard lies in the release's store.

    Named after the tar, but that of a foreign tar after itself: another card makes another index of the same tar.
    """
    return f"shards/{shard.split}/{shard.sha256 if shard.url is None else shard.index_sha256}.idx"


def resolved(base: str, url: str) -> str:
    """The URL of a foreign tar, absolute; base is that of the store whose release names it.

    A relative path goes on from the folder of the data set (in S3: from its prefix), so that both can be moved together.
    """
    if "://" in url or url.startswith("/"):
        return url
    scheme, separator, rest = base.partition("://")
    if not separator:
        return posixpath.normpath(f"{Path(base).expanduser().absolute().as_posix()}/{url}")
    bucket, _, prefix = rest.partition("/")
    # What climbs higher than the bucket ends at its top, as a path does at the root of a disk.
    return f"{scheme}://{bucket}{posixpath.normpath(f'/{prefix}/{url}')}"


def release_path(version: str, name: str) -> str:
    """Where a file of a release lies in its store."""
    return f"{RELEASES}/{version}/{name}"


def version_of(manifest: ReleaseManifest) -> str:
    """The content address: what a release says of itself, but for its parent, decides its version."""
    return _version_of_json(manifest.model_dump(mode="json"))


def split_version(url: str) -> tuple[str, str | None]:
    """URL@version as (URL, version); the version is None where none is given."""
    folder, slash, name = url.rstrip("/").rpartition("/")
    name, at, version = name.partition("@")
    return f"{folder}{slash}{name}", version if at else None


def open_release(url: str) -> Release:
    """The release that URL@version names, or the newest one at URL.

    Raises:
        SpecError: nothing is there, or not that version; says what is there.
        DataError: what is there is broken.
        UnreachableError: the store does not answer, or refuses the credentials.
    """
    base, version = split_version(url)
    store = open_store(base, must_exist=True)
    if version is not None:
        return load_release(base, store, version)
    head = read_head(store)
    if head is None:
        raise SpecError(explain(base, expected="a release", found=what_is_there(store), remedy="Make one with draf prepare."))
    try:
        return _load(base, store, load_manifest(store, head[0].version))
    except MissingError as error:
        raise dangling(store, head[0]) from error


def load_release(url: str, store: Store, version: str) -> Release:
    """One version of the data set in a store; raises as `open_release`."""
    try:
        manifest = load_manifest(store, version)
    except MissingError as error:
        raise _no_version(url, store, version) from error
    return _load(url, store, manifest)


def _load(url: str, store: Store, manifest: ReleaseManifest) -> Release:
    version = manifest.version
    with ThreadPoolExecutor(1) as other:
        # At once: each costs a round trip.
        stats = other.submit(_read_part, store, version, "stats.json", manifest.stats_sha256, ReleaseStats)
        schema = _read_part(store, version, "schema.json", manifest.schema_sha256, DataSchema)
        return Release(url=url, version=version, store=store, manifest=manifest, schema=schema, stats=stats.result())


def load_manifest(store: Store, version: str) -> ReleaseManifest:
    """release.json of a version.

    Raises:
        MissingError: there is none, so the version was never completed.
        DataError: its content is not what the version stands for.
    """
    path = release_path(version, "release.json")
    data = store.read(path)
    manifest = _parse(ReleaseManifest, data, store.where(path))
    # Of the text and not of the model: a field that a later program adds must not change the version of an old release.
    actual = _version_of_json(json.loads(data))
    if manifest.version != version or actual != version:
        found = f"the content of version {actual}"
        raise DataError(explain(store.where(path), expected=f"version {version}", found=found, remedy=RESTORE))
    return manifest


def load_subjects(store: Store, manifest: ReleaseManifest) -> pa.Table:
    """subjects.parquet of a release.

    Raises:
        DataError: it is not there or not the one that the manifest names.
    """
    path = release_path(manifest.version, "subjects.parquet")
    return read_parquet(_read_checked(store, path, manifest.subjects_sha256, remedy=RESTORE))


def read_head(store: Store) -> tuple[Head, str] | None:
    """The newest version and the tag to swap it by; None in a store without a release."""
    try:
        data, etag = store.read_with_etag(HEAD)
    except MissingError:
        return None
    return _parse(Head, data, store.where(HEAD)), etag


def list_versions(store: Store) -> list[str]:
    """Versions that are complete: their release.json is there."""
    paths = [path.split("/") for path in store.list(RELEASES)]
    return sorted(parts[1] for parts in paths if len(parts) == 3 and parts[2] == "release.json")


def release_log(url: str) -> tuple[LogEntry, ...]:
    """Every complete version: the head first, then its parents; then those that no head leads to. Raises as `open_release`."""
    newest = open_release(split_version(url)[0])
    manifests = {version: load_manifest(newest.store, version) for version in list_versions(newest.store)}
    order: list[str] = []
    version: str | None = newest.version
    while version in manifests and version not in order:
        order.append(version)
        version = manifests[version].parent
    order += [version for version in sorted(manifests) if version not in order]
    return tuple(_log_entry(manifests[version], manifests, is_head=version == newest.version) for version in order)


def lineage(store: Store, manifest: ReleaseManifest) -> list[str]:
    """The versions that a release goes back to, itself first, as far as they are there."""
    order = [manifest.version]
    while manifest.parent is not None and manifest.parent not in order:
        order.append(manifest.parent)
        try:
            manifest = load_manifest(store, manifest.parent)
        except MissingError:
            break
    return order


def _log_entry(manifest: ReleaseManifest, manifests: Mapping[str, ReleaseManifest], *, is_head: bool) -> LogEntry:
    parent = manifests.get(manifest.parent or "")
    num_studies: dict[str, int] = {}
    for by_split in manifest.counts.values():
        for split, counts in by_split.items():
            num_studies[split] = num_studies.get(split, 0) + counts["studies"]
    earlier = {delivery.delivery_id for delivery in parent.deliveries} if parent else set()
    return LogEntry(
        version=manifest.version,
        parent=manifest.parent,
        is_head=is_head,
        num_studies=num_studies,
        num_quarantined=sum(manifest.quarantined.values()),
        deliveries=tuple(delivery.delivery_id for delivery in manifest.deliveries if delivery.delivery_id not in earlier),
    )


def _read_part(store: Store, version: str, name: str, sha256: str, model: type[RecordT]) -> RecordT:
    path = release_path(version, name)
    return _parse(model, _read_checked(store, path, sha256), store.where(path))


def _version_of_json(content: dict[str, Any]) -> str:
    defining = {name: value for name, value in content.items() if name not in ("version", "parent")}
    return hashlib.sha256(canonical_json(defining)).hexdigest()[:16]


def _read_checked(store: Store, path: str, sha256: str, remedy: str = REWRITE) -> bytes:
    where = store.where(path)
    try:
        data = store.read(path)
    except MissingError as error:
        raise DataError(explain(where, expected="a file of the release", found="nothing", remedy=remedy)) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(explain(where, expected=f"sha256 {sha256[:16]}...", found="other bytes", remedy=remedy))
    return data


def _parse(model: type[RecordT], data: bytes, where: str) -> RecordT:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{first['msg']} at {'.'.join(str(part) for part in first['loc']) or 'top level'}"
        raise DataError(explain(where, expected=f"a {model.__name__}", found=found, remedy=RESTORE)) from error


def dangling(store: Store, head: Head) -> DataError:
    """The error for a HEAD.json whose version was never completed, or was deleted."""
    found = f"{head.version}, which has no release.json"
    return DataError(explain(store.where(HEAD), expected="a version that is there", found=found, remedy=RESTORE))


def _no_version(url: str, store: Store, version: str) -> SpecError:
    versions = list_versions(store)
    near = difflib.get_close_matches(version, versions, n=1)
    hint = f"Did you mean {url}@{near[0]}?" if near else "Use one of them, or the URL alone for the newest."
    found = f"versions {', '.join(versions)}" if versions else what_is_there(store)
    return SpecError(explain(f"{url}@{version}", expected="a version of the data set", found=found, remedy=hint))


def what_is_there(store: Store) -> str:
    """What a store without a HEAD.json holds, for messages."""
    versions = list_versions(store)
    if versions:
        return f"no HEAD.json but versions {', '.join(versions)}"
    paths = store.list()
    return "only the parts of an unfinished one" if any(path.startswith(("shards/", RELEASES)) for path in paths) else "none"
