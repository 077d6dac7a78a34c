"""Releases that point to foreign tars, and what is read through them."""

from pathlib import Path

from foreign_tars import KEY, source

from draf_dist.data.foreign import prepare_foreign
from draf_dist.data.release import Release
from draf_dist.schema.identity import sample_uid
from draf_dist.schema.release import SPLITS, Split


def made(folder: Path, limit: float = 0.05, **changes: object) -> Release:
    """The release of the tars in a folder."""
    return prepare_foreign(source(folder / "tars", **changes), str(folder / "out"), subject_key=KEY, limit=limit)


def stored(release: Release) -> dict[int, tuple[Split, str, str, dict[str, bytes]]]:
    """By uid: split, site, label and the bytes of each modality, read as its index says, where its shard points to."""
    found = {}
    for split in SPLITS:
        for shard in release.shards(split):
            index = release.index(shard)
            store, path = release.tar_location(shard)
            assert index.num_samples == shard.num_samples
            assert index.sites is not None
            assert index.labels is not None
            for i, uid in enumerate(index.uids.tolist()):
                members = {name: index.member(i, name) for name in index.modalities}
                data = {n: bytes(store.read_range(path, m.offset, m.stop)) for n, m in members.items() if m is not None}
                assert all(members[n].matches(content) for n, content in data.items())
                site, label = release.schema.sites[index.sites[i]], release.schema.classes[index.labels[i]]
                assert uid not in found
                found[uid] = (split, site, label, data)
    return found


def uid(key: str) -> int:
    return sample_uid(KEY, source="wards", sample=key)
