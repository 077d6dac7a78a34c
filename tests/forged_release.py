"""Releases that nobody prepared: versions that agree with their own digests, whatever they say of their studies."""

import hashlib
from collections.abc import Mapping

from draf_dist.data.release import Release, open_release, release_path, version_of
from draf_dist.schema.release import ReleaseManifest


def forged(release: Release, parts: Mapping[str, bytes] | None = None, **changes: object) -> Release:
    """A version beside the release with these files and these fields of the manifest instead, and all digests right."""
    names = ["schema.json", "stats.json", "subjects.parquet", "quarantine.json"] + ["sums.json"] * bool(release.manifest.deliveries)
    files = {name: release.store.read(release_path(release.version, name)) for name in names} | dict(parts or {})
    digests = {f"{name.split('.')[0]}_sha256": hashlib.sha256(data).hexdigest() for name, data in files.items()}
    draft = ReleaseManifest.model_validate(release.manifest.model_dump() | digests | changes)
    version = version_of(draft)
    for name, data in files.items():
        release.store.write(release_path(version, name), data)
    manifest = draft.model_copy(update={"version": version})
    release.store.write(release_path(version, "release.json"), manifest.model_dump_json().encode())
    return open_release(f"{release.url}@{version}")
