"""One run of the loader benchmark, in a process of its own: reads a Job from the command line, measures, writes what it found.

    python benchmarks/loader_run.py '<Job as JSON>' OUT.json          one run
    python benchmarks/loader_run.py --write ARM DATA FOLDER OUT.json  an arm's own copy of the data

An arm whose packages are not there is reported as such, with exit status 0; anything else that goes wrong is a crash, and counts.
"""

import gc
import importlib
import json
import os
import resource
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import numpy as np
from loader_job import BATCH, BUCKET, Images, Job, image_fingerprints

MODULES = {
    "ours": "loader_ours",
    "ours-joint": "loader_ours",
    "mosaicml": "loader_mosaicml",
    "litdata": "loader_litdata",
    "webdataset": "loader_webdataset",
    "webdataset-stream": "loader_webdataset",
    "raw": "loader_raw",
    "decode": "loader_decode",
}
# The first fifth of an epoch is not counted as steady.
WARM_UP = 0.2
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
TRAFFIC = ("SeaweedFS_s3_bucket_traffic_sent_bytes_total", "SeaweedFS_s3_request_total")


class Counters:
    """Processor seconds of this process and all below it, bytes and requests that the S3 server has counted."""

    def __init__(self, metrics: str) -> None:
        self.cpu_s = cpu_seconds_below(os.getpid())
        self.bytes, self.requests = s3_traffic(metrics) if metrics else (0, 0)

    def minus(self, before: "Counters") -> dict[str, float]:
        return {name: getattr(self, name) - getattr(before, name) for name in ("cpu_s", "bytes", "requests")}


def cpu_seconds_below(root: int) -> float:
    """User and system time of a process, of its descendants, and of those of them that have ended and were waited for."""
    parents, ticks = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # The name of the program, which comes first, may hold spaces and parentheses.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
            process = int(folder.name)
            parents[process], ticks[process] = int(fields[1]), sum(int(field) for field in fields[11:15])
    below, found = {root}, 1
    while found:
        more = {process for process, parent in parents.items() if parent in below} - below
        below, found = below | more, len(more)
    return sum(ticks[process] for process in below) / CLOCK_TICKS


def s3_traffic(metrics: str) -> tuple[int, int]:
    """Bytes sent and requests answered of the benchmark's bucket."""
    totals = dict.fromkeys(TRAFFIC, 0.0)
    with urllib.request.urlopen(metrics, timeout=10) as answer:  # noqa: S310
        for line in answer.read().decode().splitlines():
            name, _, rest = line.partition("{")
            if name in totals and f'bucket="{BUCKET}"' in rest:
                totals[name] += float(rest.rpartition(" ")[2])
    sent, requests = totals.values()
    return int(sent), int(requests)


def measure(batches: Iterator[Images], began: float, expected: np.ndarray, before: Counters, metrics: str) -> dict[str, object]:
    """Goes through one epoch, whose clock began at `began`."""
    times, images, rows, found = [], [], [], []
    for batch in batches:
        # Of all rows, and then of those with an image: choosing the rows first would copy the batch, at that arm's expense.
        seen = image_fingerprints(batch.pixels)
        found.append(seen if batch.present is None else seen[batch.present])
        times.append(time.perf_counter() - began)
        images.append(len(found[-1]))
        rows.append(len(batch.pixels))
    steady = len(times) - 1 - int(WARM_UP * len(times))
    num_images = sum(images)
    unique = np.unique(np.concatenate(found))
    return {
        "seconds": times[-1],
        "first_batch_s": times[0],
        "images": num_images,
        "images_per_s": num_images / times[-1],
        "steady_images_per_s": sum(images[-steady:]) / (times[-1] - times[-steady - 1]) if steady > 0 else None,
        "samples_per_s": sum(rows) / times[-1],
        "unique": len(unique),
        "repeated": num_images - len(unique),
        "unknown": int((~np.isin(unique, expected)).sum()),
        "batches": len(rows),
        "short_batches": sum(size != BATCH for size in rows),
        **Counters(metrics).minus(before),
    }


def run(job: Job) -> dict[str, object]:
    try:
        arm = importlib.import_module(MODULES[job.arm])
    except ModuleNotFoundError as error:
        return {"not_installed": str(error)}
    import torch

    torch.set_num_threads(1)
    imported = time.time() - job.started
    expected = np.load(Path(job.data) / "fingerprints.npy")
    open_epochs: Callable[[Job], Callable[[int], Iterator[Images]]] = arm.open_epochs
    phases, epoch = {}, None
    # What the imports have left is collected once, now: it takes a tenth of a second, and would fall into some epoch by chance.
    gc.collect()
    for number, phase in enumerate(("cold", "warm")[: job.epochs]):
        before, began = Counters(job.metrics), time.perf_counter()
        if epoch is None:
            epoch = open_epochs(job)
        phases[phase] = measure(iter(epoch(number)), began, expected, before, job.metrics)
    return {
        "import_s": imported,
        "first_batch_with_import_s": imported + float(str(phases["cold"]["first_batch_s"])),
        "own_peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": versions(arm),
        "settings": arm.SETTINGS,
        **phases,
    }


def versions(arm: ModuleType) -> dict[str, str]:
    found = {}
    for name in arm.PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_copy(name: str, data: Path, out: Path) -> dict[str, object]:
    try:
        arm = importlib.import_module(MODULES[name])
    except ModuleNotFoundError as error:
        return {"not_installed": str(error)}
    arm.write(data, out)
    return {"bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file())}


def main() -> None:
    if sys.argv[1] == "--write":
        name, data, folder, out = sys.argv[2:]
        result = write_copy(name, Path(data), Path(folder))
    else:
        out = sys.argv[2]
        result = run(Job(**json.loads(sys.argv[1])))
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
