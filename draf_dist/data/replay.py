"""The two parts of a release that replay mixes: the shards that an earlier version of the data set lacks, and those that it has."""

from collections.abc import Set
from dataclasses import replace

from draf_dist.data.release import Release, load_release
from draf_dist.errors import SpecError, explain


def new_and_old(release: Release, since: str) -> tuple[Release, Release]:
    """Both parts, each with something to train on.

    Raises:
        SpecError: there is no such version, or one of the two parts has no study to train on.
    """
    new, old = parts_since(release, since)
    for part, expected, remedy in (
        (new, f"training studies that version {since} lacks", "Name an earlier version (draf release log), or leave replay out."),
        (old, f"training studies of version {since}", "Name a version that this one descends from (draf release log)."),
    ):
        if num_training(part) == 0:
            raise SpecError(explain(f"replay.since: {release.pinned_url}", expected=expected, found="none", remedy=remedy))
    return new, old


def parts_since(release: Release, since: str) -> tuple[Release, Release]:
    """The release with the shards only that version `since` lacks, and with those only that it has.

    Raises:
        SpecError: there is no such version.
    """
    earlier = {shard.sha256 for shard in load_release(release.url, release.store, since).manifest.shards}
    every = {shard.sha256 for shard in release.manifest.shards}
    return only_shards(release, every - earlier), only_shards(release, every & earlier)


def only_shards(release: Release, shards: Set[str]) -> Release:
    """A view of a release that has some of its shards only, by sha256. It makes no claim of receipts: those are of all shards."""
    kept = tuple(shard for shard in release.manifest.shards if shard.sha256 in shards)
    return replace(release, manifest=release.manifest.model_copy(update={"shards": kept, "receipts": {}}))


def num_training(release: Release) -> int:
    """Studies of the training split, by its shards."""
    return sum(shard.num_samples for shard in release.shards("train"))
