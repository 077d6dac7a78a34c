"""A process that reads epoch after epoch, as a training does, and what it holds after each: memory, files, threads."""

import gc
import os
import threading
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from reading_ranks import Reader

from draf_dist.data.loader import evaluation_batches
from draf_dist.data.release import open_release

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Epochs that come before memory is what it stays.
WARM_UP = 10
OF_A_LOADER = ("decode", "fetch", "plan", "patch")


@dataclass
class Held:
    """After every epoch; threads: all of the process. left: names of the loader's threads that are alive after closing."""

    resident_bytes: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def mib_per_epoch(self) -> float:
        """The median slope between any two epochs after warming up (Theil and Sen), in MiB."""
        held = np.array(self.resident_bytes[WARM_UP:], dtype=np.float64) / 2**20
        one, other = np.triu_indices(len(held), 1)
        return float(np.median((held[other] - held[one]) / (other - one)))

    def note(self, samples: int) -> None:
        gc.collect()
        self.samples.append(samples)
        self.resident_bytes.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES)
        self.files.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208 - scandir would be one more
        self.threads.append(len(list(Path("/proc/self/task").iterdir())))


def train_for(reader: Reader, epochs: int) -> Held:
    """Goes on with one pass over all epochs and validates after each, on batches of passes that begin and end."""
    held, release = Held(), open_release(reader.url)
    steps = reader.order(release).steps_per_epoch
    with closing(reader.loader(release).batches()) as batches:
        for _ in range(epochs):
            samples = sum(int((next(batches)[1].weight > 0).sum()) for _ in range(steps))
            samples += sum(batch.num_rows for batch in evaluation_batches(release, "val", reader.batch_size))
            held.note(samples)
    held.left = [thread.name for thread in threading.enumerate() if thread.name.startswith(OF_A_LOADER)]
    return held


def train_in_process(reader: Reader, epochs: int, environment: dict[str, str], pipe: Any) -> None:
    """The same, told through a pipe."""
    os.environ.update(environment)
    pipe.send(train_for(reader, epochs))
