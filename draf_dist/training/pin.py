"""What a job reads, made immutable before it begins."""

from typing import Any

from draf_dist.data.release import open_release
from draf_dist.errors import SpecError, explain
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import AnyJob
from draf_dist.training.pretrained import pin_encoder


def pin(job: AnyJob) -> AnyJob:
    """The job with URL@version in place of a URL that moves, and URL@sha256 of an encoder that may be trained again.

    Raises:
        SpecError: there is no such release, or it can't fill a batch; see pin_encoder for encoders.
    """
    release = open_release(job.release)
    for split in ("train", "val"):
        if sum(shard.num_samples for shard in release.shards(split)) == 0:
            remedy = "Prepare a data set with more subjects."
            raise SpecError(explain(release.pinned_url, expected=f"studies in the {split} split", found="none", remedy=remedy))
    update: dict[str, Any] = {"release": release.pinned_url}
    if isinstance(job, FinetuneJob):
        update["pretrained"] = {modality: pin_encoder(url) for modality, url in job.pretrained.items()}
    return job.model_copy(update=update)
