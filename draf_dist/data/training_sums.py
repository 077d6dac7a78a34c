"""The sums that a release's statistics follow from: stored, or read from its training shards."""

from draf_dist.data.decode import UndecodableError
from draf_dist.data.release import REWRITE, Release, tar_path
from draf_dist.data.stats import StatsBuilder, decode_member
from draf_dist.errors import DataError, explain
from draf_dist.schema.identity import uid_name
from draf_dist.schema.release import TrainingSums
from draf_dist.storage import MissingError


def training_sums(release: Release) -> TrainingSums:
    """Exact: what goes on from here gives the statistics that one pass over everything would give, bit for bit.

    A release made by `draf prepare` stores no sums, so its training split is read once, one shard in memory at a time.

    Raises:
        DataError: a shard is missing or broken.
    """
    if (stored := release.sums()) is not None:
        return stored
    builder = StatsBuilder(release.schema)
    for shard in release.shards("train"):
        index, where = release.index(shard), release.store.where(tar_path(shard))
        try:
            content = release.store.read(tar_path(shard))
        except MissingError as error:
            raise DataError(explain(where, expected="a shard", found="nothing", remedy=REWRITE)) from error
        for i in range(index.num_samples):
            inputs = {}
            for spec in release.schema.modalities:
                if (member := index.member(i, spec.name)) is None:
                    continue
                data = content[member.offset : member.stop]
                try:
                    if not member.matches(data):
                        raise UndecodableError("other bytes than its index says")
                    inputs[spec.name] = decode_member(data, spec)
                except UndecodableError as error:
                    place = f"{where}: {uid_name(int(index.uids[i]))}.{spec.name}"
                    raise DataError(explain(place, expected=f"the {spec.kind}", found=str(error), remedy=REWRITE)) from error
            builder.add(inputs)
    return builder.sums()
