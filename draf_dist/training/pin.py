"""What a job reads, made immutable before it begins."""

from typing import Any

from draf_dist.data.release import Release, open_release
from draf_dist.data.replay import new_and_old
from draf_dist.errors import SpecError, explain
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import AnyJob
from draf_dist.training.pretrained import pin_encoder
from draf_dist.training.warm_start import pin_start


def pin(job: AnyJob) -> AnyJob:
    """The job with URL@version in place of a URL that moves, and URL@sha256 of a model that may be trained again.

    Local paths become absolute.

    Raises:
        SpecError: there is no such release, or it can't fill a batch; see pin_encoder, pin_start and new_and_old.
    """
    release = open_release(job.release)
    for split in ("train", "val"):
        if sum(shard.num_samples for shard in release.shards(split)) == 0:
            remedy = "Prepare a data set with more subjects."
            raise SpecError(explain(release.pinned_url, expected=f"studies in the {split} split", found="none", remedy=remedy))
    # The store's URL: absolute where the release is a local folder, so that the run can be read from another working folder.
    update: dict[str, Any] = {"release": f"{release.store.url}@{release.version}"}
    if isinstance(job, FinetuneJob):
        update |= _pin_starts(job, release)
    return job.model_copy(update=update)


def _pin_starts(job: FinetuneJob, release: Release) -> dict[str, Any]:
    """What the job starts from, pinned; and that there is something to replay, before anything is written."""
    if job.replay is not None:
        new_and_old(release, job.replay.since)
    warm_start = None if job.warm_start is None else pin_start(job.warm_start, job.model, release.schema)
    return {"pretrained": {modality: pin_encoder(url) for modality, url in job.pretrained.items()}, "warm_start": warm_start}
