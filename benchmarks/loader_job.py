"""What the driver and the runs of the loader benchmark both know: the layout of the data, and what one run is asked to do."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SIDE = 256
BATCH = 64
# Decoding threads of ours, worker processes of the peers.
WORKERS = 2
SHARD_BYTES = 7 * 2**20
SERIES_SHAPE, CODES_SHAPE = (24, 8), (1, 16)
BUCKET = "bench"

# Sixteen pixels of an image, and odd numbers to mix them with.
_ROWS = (np.arange(16) * 37 + 5) % SIDE
_COLUMNS = (np.arange(16) * 101 + 11) % SIDE
_MIX = np.random.Generator(np.random.Philox(key=7)).integers(0, 2**63, 48, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


@dataclass(frozen=True)
class Job:
    """One run: an arm in a setting, in a process of its own.

    data: folder of the data set. bucket: URL of the same in S3, "" for the local disk. cache: an empty folder that may be filled.
    epochs: 1 is the cold one alone. metrics: URL where the S3 server counts. started: time.time() at the start of the process.
    """

    arm: str
    data: str
    bucket: str
    cache: str
    epochs: int
    seed: int
    metrics: str
    started: float

    @property
    def is_remote(self) -> bool:
        return bool(self.bucket)

    def source(self, part: str) -> str:
        """Where a part of the data set (`wds`, `raw`, ...) lies in this setting."""
        return f"{self.bucket}/{part}" if self.bucket else str(Path(self.data) / part)

    def shards(self, part: str) -> list[str]:
        """Names of the tars of a part."""
        return sorted(path.name for path in (Path(self.data) / part).glob("*.tar"))

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Images:
    """What an arm hands out for a batch. pixels: uint8 (B, H, W, 3), any strides; present: bool (B,) where some have no image."""

    pixels: np.ndarray
    present: np.ndarray | None = None


def image_fingerprints(pixels: np.ndarray) -> np.ndarray:
    """uint64 (B,): tells any two images of the data set apart, from sixteen pixels each."""
    chosen = pixels[:, _ROWS, _COLUMNS, :].reshape(len(pixels), -1).astype(np.uint64)
    return (chosen * _MIX).sum(1, dtype=np.uint64)
