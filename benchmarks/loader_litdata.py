"""Arm `litdata`: LitData on its own chunks, StreamingDataset and StreamingDataLoader as its documentation shows them.

Its S3 client refuses plain HTTP, which every test server speaks; `allow_http` has to be set in a private variable. Workers are
forked, its default: it asks for spawn only with Parquet and with raw files.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# It would ask the package index for a newer version.
os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"

import litdata  # noqa: E402
import simplejpeg  # noqa: E402
import torch  # noqa: E402
from litdata.streaming import downloader  # noqa: E402
from loader_job import BATCH, SHARD_BYTES, WORKERS, Images, Job  # noqa: E402
from torch import Tensor  # noqa: E402

PACKAGES = ("litdata", "obstore", "boto3", "torch", "simplejpeg")
SETTINGS = (
    f"chunks of raw JPEG bytes, StreamingDataset(shuffle=True), StreamingDataLoader(num_workers={WORKERS}, persistent_workers=True)"
    ", all else by default; allow_http set in its private client options"
)


def read_sample(path: str) -> dict[str, object]:
    return {"image": Path(path).read_bytes(), "label": int(Path(path).stem)}


def decode(sample: dict[str, bytes]) -> Tensor:
    return torch.from_numpy(simplejpeg.decode_jpeg(sample["image"]))


def write(data: Path, out: Path) -> None:
    """The images of raw/ as LitData chunks."""
    paths = [str(path) for path in sorted((data / "raw").iterdir())]
    litdata.optimize(fn=read_sample, inputs=paths, output_dir=str(out), chunk_bytes=SHARD_BYTES, num_workers=1, verbose=False)


def open_epochs(job: Job) -> Callable[[int], Iterator[Images]]:
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    remote = {
        "cache_dir": job.cache,
        # The default keeps 50 GB of the disk free, whatever its size; nothing is to be evicted here.
        "max_cache_size": "10GB",
        "storage_options": {"endpoint_url": os.environ.get("AWS_ENDPOINT_URL", "")},
    }
    options = remote if job.is_remote else {}
    dataset = litdata.StreamingDataset(job.source("litdata"), shuffle=True, seed=job.seed, transform=decode, **options)
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)

    def epoch(number: int) -> Iterator[Images]:
        return (Images(batch.numpy()) for batch in loader)

    return epoch
