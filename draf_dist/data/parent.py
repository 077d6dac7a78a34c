"""The release that a new one follows: its record of splits goes on, under the same name and the same subject key."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from draf_dist.data.release import dangling, load_manifest, load_subjects, read_head, split_version
from draf_dist.errors import GateError, SpecError, explain
from draf_dist.schema.release import ReleaseManifest, Split
from draf_dist.storage import MissingError, Store


@dataclass(frozen=True)
class Parent:
    """The newest release when a run begins; manifest is None where there is none. etag: of HEAD.json then.

    assigned: component -> split, as decided so far.
    """

    manifest: ReleaseManifest | None = None
    etag: str | None = None
    assigned: Mapping[str, Split] | None = None

    @property
    def version(self) -> str | None:
        """Of the release, None where there is none."""
        return None if self.manifest is None else self.manifest.version


def unversioned(url: str) -> str:
    """The URL of a data set, to be written to.

    Raises:
        SpecError: it names a version, which can't change.
    """
    base, version = split_version(url)
    if version is not None:
        remedy = f"Name the data set: {base}"
        raise SpecError(explain(url, expected="a URL without a version", found=f"@{version}", remedy=remedy))
    return base


def key_check(subject_key: bytes) -> str:
    """Names the key without giving it away: 16 hex digits."""
    return hmac.new(subject_key, b"draf_dist: which subject key", hashlib.sha256).hexdigest()[:16]


def find_parent(store: Store, url: str, name: str, subject_key: bytes) -> Parent:
    """What HEAD.json names now.

    Raises:
        SpecError: it is a release of another data set.
        DataError: HEAD.json leads nowhere, or the manifest or the table of subjects is broken.
        GateError: it was made with another subject key.
    """
    head = read_head(store)
    if head is None:
        return Parent()
    # The small files are left unread: one that is lost or broken is to be written again by this very run.
    try:
        manifest = load_manifest(store, head[0].version)
    except MissingError as error:
        raise dangling(store, head[0]) from error
    if manifest.name != name:
        remedy = "Prepare to another URL."
        raise SpecError(explain(url, expected=f"releases of {name!r}", found=f"of {manifest.name!r}", remedy=remedy))
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
    return Parent(manifest, head[1], dict(zip(table["component"], table["split"], strict=True)))
