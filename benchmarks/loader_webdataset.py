"""Arm `webdataset`: the pipeline that its documentation recommends, on the same tars as ours.

Shards are shuffled, then samples in a buffer of 1,000; batches are made in the workers. From S3 by `pipe:curl` with presigned URLs,
as it has no S3 client of its own. `webdataset` keeps the shards in cache_dir, which is what makes a second epoch warm;
`webdataset-stream` has no cache and streams anew in every epoch.
"""

from collections.abc import Callable, Iterator

import simplejpeg
import torch
import webdataset
from loader_job import BATCH, WORKERS, Images, Job
from torch import Tensor
from torch.utils.data import default_collate

PACKAGES = ("webdataset", "torch", "simplejpeg")
SETTINGS = (
    f"WebDataset(shardshuffle=100).shuffle(1000), decoded and batched in WebLoader(num_workers={WORKERS}, persistent_workers=True)"
    "; S3 by pipe:curl, presigned, with cache_dir or (webdataset-stream) without"
)


def decode(sample: dict[str, bytes]) -> Tensor:
    return torch.from_numpy(simplejpeg.decode_jpeg(sample["jpg"]))


def open_epochs(job: Job) -> Callable[[int], Iterator[Images]]:
    names = job.shards("wds")
    urls = _presigned(job, names) if job.is_remote else [f"{job.source('wds')}/{name}" for name in names]
    cached = job.is_remote and job.arm == "webdataset"
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=100, seed=job.seed, cache_dir=job.cache if cached else None)
        .shuffle(1000)
        .map(decode)
        .batched(BATCH, collation_fn=default_collate)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True)

    def epoch(number: int) -> Iterator[Images]:
        return (Images(batch.numpy()) for batch in loader)

    return epoch


def _presigned(job: Job, names: list[str]) -> list[str]:
    """A signature a shard, so that no key stands in a command line."""
    import os

    import botocore.session

    client = botocore.session.get_session().create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    bucket, _, prefix = job.source("wds").removeprefix("s3://").partition("/")
    keys = [{"Bucket": bucket, "Key": f"{prefix}/{name}"} for name in names]
    return [f"pipe:curl -s -f '{client.generate_presigned_url('get_object', Params=key, ExpiresIn=3600)}'" for key in keys]
