"""Making a release the newest one: its small files, release.json last of them, then HEAD.json by compare-and-swap."""

from draf_dist.data.parent import Parent
from draf_dist.data.parts import Parts, encode_record
from draf_dist.data.release import HEAD, read_head, release_path
from draf_dist.errors import GateError, explain
from draf_dist.protocols import publish
from draf_dist.protocols.operations import run_on
from draf_dist.schema.release import Head, ReleaseManifest
from draf_dist.storage import Store


class OvertakenError(GateError):
    """Another run published meanwhile: what was to be published does not build on the newest release."""


def write_release(store: Store, manifest: ReleaseManifest, parts: Parts) -> None:
    """Completes a version. No URL leads to it yet but URL@version."""
    files = {release_path(manifest.version, name): data for name, data in parts.items()}
    run_on(store, publish.write_release(files, release_path(manifest.version, "release.json"), encode_record(manifest)))


def move_head(store: Store, version: str, parent: Parent) -> None:
    """Makes a complete version the newest release, if its parent still is.

    Raises:
        OvertakenError: it is not.
    """
    if version == parent.version:
        return
    if not run_on(store, publish.move_head(HEAD, encode_record(Head(version=version)), parent.etag)):
        raise _overtaken(store, parent, read_head(store))


def refuse_if_overtaken(store: Store, parent: Parent) -> None:
    """Raises OvertakenError if HEAD.json names another release than the parent."""
    now = read_head(store)
    if now is not None and now[0].version != parent.version:
        raise _overtaken(store, parent, now)


def _overtaken(store: Store, parent: Parent, now: tuple[Head, str] | None) -> OvertakenError:
    return OvertakenError(
        explain(
            store.where(HEAD),
            expected=f"version {parent.version or '(none)'}, on which this run builds",
            found=f"{now[0].version if now else 'none'}: another run changed it meanwhile",
            remedy="Run the same command again: it will build on that release.",
        )
    )
