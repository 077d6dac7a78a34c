"""Arm `mosaicml`: MosaicML Streaming on its own MDS shards, defaults but for the batch size that its documentation asks for.

torchvision is replaced by empty modules: the CPU build of torch has none that fits, and `import streaming` needs the names only for
data sets that are not used here. transformers is imported before that, as it would take the empty modules for the real ones.
"""

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import simplejpeg
import torch
import transformers.feature_extraction_utils
import transformers.tokenization_utils_base  # noqa: F401
from loader_job import BATCH, SHARD_BYTES, WORKERS, Images, Job
from torch import Tensor
from torch.utils.data import DataLoader

PACKAGES = ("mosaicml-streaming", "boto3", "torch", "simplejpeg")
SETTINGS = (
    f"MDS of raw JPEG bytes, StreamingDataset(shuffle=True, batch_size={BATCH}), py1e and all else by default, "
    f"DataLoader(num_workers={WORKERS}, persistent_workers=True); torchvision is a stub"
)
COLUMNS = {"image": "bytes", "label": "int"}


def _stub(name: str, **members: object) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


_stub("torchvision")
_stub("torchvision.datasets", VisionDataset=type("VisionDataset", (), {}))
_stub("torchvision.transforms")
_stub("torchvision.transforms.functional", to_tensor=None)

import streaming  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402


class Decoded(streaming.StreamingDataset):
    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(simplejpeg.decode_jpeg(super().__getitem__(index)["image"]))


def write(data: Path, out: Path) -> None:
    """The images of raw/ as MDS shards."""
    with streaming.MDSWriter(out=str(out), columns=COLUMNS, size_limit=SHARD_BYTES) as writer:
        for index, path in enumerate(sorted((data / "raw").iterdir())):
            writer.write({"image": path.read_bytes(), "label": index})


def open_epochs(job: Job) -> Callable[[int], Iterator[Images]]:
    # What a run that crashed has left in /dev/shm stops the next one; this is the remedy that its documentation names.
    clean_stale_shared_memory()
    places = {"remote": job.source("mds"), "local": job.cache} if job.is_remote else {"local": job.source("mds")}
    dataset = Decoded(**places, shuffle=True, shuffle_seed=job.seed, batch_size=BATCH)
    loader = DataLoader(dataset, BATCH, num_workers=WORKERS, persistent_workers=True)

    def epoch(number: int) -> Iterator[Images]:
        return (Images(batch.numpy()) for batch in loader)

    return epoch
