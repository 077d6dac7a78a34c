"""Whether a release with deliveries is what it says: its parent, unchanged, and the studies of its newest delivery."""

from draf_dist.data.release import REWRITE, Release, load_manifest, load_subjects
from draf_dist.errors import DataError, explain
from draf_dist.storage import MissingError

LEAK_REMEDY = "Do not train on this release; prepare it again."


def broken(where: str, expected: str, found: str) -> DataError:
    """The error for bytes that are not what the release says."""
    return DataError(explain(where, expected=expected, found=found, remedy=REWRITE))


def leak(where: str, expected: str, found: str) -> DataError:
    """The error for data that would make an evaluation dishonest."""
    return DataError(explain(where, expected=expected, found=found, remedy=LEAK_REMEDY))


def check_descent(release: Release) -> None:
    """Holds a release with deliveries against its parent, as far as that is still there: its small files alone are read.

    Raises:
        DataError: a delivery is named twice or counted wrongly; the parent's shards are not the first, in their order; or a study
            of the parent is gone or has another split.
    """
    manifest, where = release.manifest, release.pinned_url
    ids = [delivery.delivery_id for delivery in manifest.deliveries]
    if len(set(ids)) != len(ids):
        raise broken(where, "every delivery once", "one twice")
    if not manifest.deliveries or manifest.parent is None:
        return
    try:
        parent = load_manifest(release.store, manifest.parent)
    except MissingError:
        return
    if parent.deliveries != manifest.deliveries[:-1] or parent.shards != manifest.shards[: len(parent.shards)]:
        raise broken(where, f"the deliveries and shards of its parent {parent.version}, then its own", "others")
    before, now = ({row["uid"]: row for row in load_subjects(release.store, each).to_pylist()} for each in (parent, manifest))
    if any(now.get(uid) != row for uid, row in before.items()):
        raise leak(where, f"every study of its parent {parent.version} as it was, in the same split", "another")
    if len(now) - len(before) != manifest.deliveries[-1].num_studies:
        expected = f"{manifest.deliveries[-1].num_studies} studies of delivery {ids[-1]}"
        raise broken(where, expected, f"{len(now) - len(before)}")
