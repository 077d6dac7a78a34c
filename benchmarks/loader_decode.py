"""Arm `decode`: the bound. The JPEGs lie in memory; threads decode them into one batch that is made once. Nothing else is done."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
from loader_job import BATCH, SIDE, WORKERS, Images, Job

PACKAGES = ("simplejpeg",)
SETTINGS = f"{WORKERS} threads, JPEGs in memory, one preallocated batch; no shuffle buffer, no check, no copy"
# As in our loader: the last thread to finish holds the batch up for less.
CHUNKS_PER_THREAD = 4


def open_epochs(job: Job) -> Callable[[int], Iterator[Images]]:
    jpegs = [path.read_bytes() for path in sorted((Path(job.data) / "raw").iterdir())]
    batch = np.zeros((BATCH, SIDE, SIDE, 3), np.uint8)
    rng = np.random.default_rng(job.seed)
    pool = ThreadPoolExecutor(WORKERS)

    def decode(rows: range, chosen: np.ndarray) -> None:
        for row in rows:
            simplejpeg.decode_jpeg(jpegs[chosen[row]], buffer=batch[row])

    def epoch(number: int) -> Iterator[Images]:
        order = rng.permutation(len(jpegs))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            size = -(-len(chosen) // (WORKERS * CHUNKS_PER_THREAD))
            chunks = [range(first, min(first + size, len(chosen))) for first in range(0, len(chosen), size)]
            for _ in pool.map(lambda rows, chosen=chosen: decode(rows, chosen), chunks):
                pass
            yield Images(batch[: len(chosen)])

    return epoch
