"""A small release, and an earlier version of it that lacks its last training shards: what replay takes for old and new."""

from pathlib import Path

from forged_release import forged
from small_runs import SUBJECT_KEY

from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release
from draf_dist.sources.card import load_card
from draf_dist.sources.synth import synthesise

NEW_SHARDS = 2


def grown_release(folder: Path, *, num_subjects: int, seed: int) -> tuple[Release, str]:
    """The release, made in the folder, and the version that it is taken to have grown from."""
    synthesise(folder / "export", num_sites=2, num_subjects=num_subjects, seed=seed)
    source = load_card(folder / "export" / "card.yaml").build(folder / "export" / "raw")
    release = prepare(source, str(folder / "release"), subject_key=SUBJECT_KEY, shard_size_bytes=40_000)
    return release, version_without(release, {shard.sha256 for shard in release.shards("train")[-NEW_SHARDS:]})


def version_without(release: Release, shards: set[str]) -> str:
    """Writes a version of the data set that lacks these shards, by sha256."""
    kept = tuple(shard for shard in release.manifest.shards if shard.sha256 not in shards)
    return forged(release, shards=kept).version
