"""Arm `raw`: what one writes without any library. A file an image, torch's DataLoader, a full shuffle; in S3 a GET an image.

There is no cache: every epoch reads the files. The GETs of a batch are sent together, through obstore, by the worker that decodes
it. The store is opened in the worker, since its threads don't survive a fork.
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from loader_data import raw_name
from loader_job import BATCH, WORKERS, Images, Job
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

PACKAGES = ("torch", "obstore", "simplejpeg")
SETTINGS = f"a file an image, DataLoader(num_workers={WORKERS}, shuffle=True, persistent_workers=True), in S3 a batch of GETs"


class LocalFiles(Dataset[Tensor]):
    def __init__(self, folder: Path, num_images: int) -> None:
        self._folder, self._num_images = folder, num_images

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(simplejpeg.decode_jpeg((self._folder / raw_name(index)).read_bytes()))


class S3Files(Dataset[Tensor]):
    """As LocalFiles, but a worker asks for all images of a batch at once, which is what `__getitems__` is for."""

    def __init__(self, url: str, num_images: int) -> None:
        self._url, self._num_images = url, num_images
        self._store: object = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return self._num_images

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        from obstore.store import S3Store

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._store = S3Store.from_url(self._url, endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True})
        contents = self._loop.run_until_complete(self._read(indices))
        return [torch.from_numpy(simplejpeg.decode_jpeg(data)) for data in contents]

    async def _read(self, indices: list[int]) -> list[bytes]:
        import obstore

        async def read(index: int) -> bytes:
            answer = await obstore.get_async(self._store, raw_name(index))
            return bytes(await answer.bytes_async())

        return await asyncio.gather(*(read(index) for index in indices))


def open_epochs(job: Job) -> Callable[[int], Iterator[Images]]:
    num_images = len(np.load(Path(job.data) / "fingerprints.npy", mmap_mode="r"))
    source = job.source("raw")
    dataset = S3Files(source, num_images) if job.is_remote else LocalFiles(Path(source), num_images)
    order = torch.Generator().manual_seed(job.seed)
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True, generator=order)

    def epoch(number: int) -> Iterator[Images]:
        return (Images(batch.numpy()) for batch in loader)

    return epoch
