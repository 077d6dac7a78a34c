"""Ranged reads of a bucket: s3fs, obstore bare, our store (obstore with retries and counting), on a real server on this machine.

    python benchmarks/transport.py [--rounds 5] [--threads 8] [--megabytes 128] [--json FILE]

Requests of 1 MiB and of 33 KB at random places of one object, from threads that wait for their answer. Rounds are interleaved:
every way reads once, then all again, beginning with another. CPU time is that of this process (the server is another one), for
each request. The rule for another transport beside s3fs: at least 1.5 times its requests per second.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import obstore
import s3fs
from obstore.store import S3Store as Bucket
from rich.console import Console
from rich.table import Table

from draf_dist.launch.local_s3 import LocalS3
from draf_dist.storage import open_store

SIZES = (2**20, 33_000)
REQUESTS = {2**20: 150, 33_000: 600}
OBJECT = "data.bin"
Read = Callable[[int, int], object]


class Measured(NamedTuple):
    requests_per_s: float
    cpu_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, LocalS3(Path(folder)) as server:
        os.environ.update(server.environment)
        found = measure(server.create_bucket("transport"), options)
    show(found)
    if options.json:
        options.json.write_text(json.dumps({f"{name}, {size}": runs for (name, size), runs in found.items()}, indent=1))


def measure(url: str, options: argparse.Namespace) -> dict[tuple[str, int], list[Measured]]:
    """Every way to read, for every size, in interleaved rounds."""
    content = os.urandom(options.megabytes * 10**6)
    open_store(url).write(OBJECT, content)
    ways = readers(url)
    for read in ways.values():
        assert bytes(read(5, 2**20)) == content[5 : 2**20]  # opens the connection too
    found: dict[tuple[str, int], list[Measured]] = {}
    draws = random.Random(0)
    for number in range(options.rounds):
        for size in SIZES:
            starts = [draws.randrange(len(content) - size) for _ in range(REQUESTS[size])]
            names = [*ways][number % len(ways) :] + [*ways][: number % len(ways)]
            for name in names:
                found.setdefault((name, size), []).append(timed(ways[name], starts, size, options.threads))
    return found


def readers(url: str) -> dict[str, Read]:
    """Ways to read bytes [start, stop) of the object; nobody repeats a request."""
    bucket = url.removeprefix("s3://")
    files, store = s3fs.S3FileSystem(use_listings_cache=False), open_store(url)
    limits = {"allow_http": True, "timeout": timedelta(minutes=5), "read_timeout": timedelta(seconds=10)}
    bare = Bucket(bucket, client_options=limits, retry_config={"max_retries": 0, "retry_timeout": timedelta(0)})
    return {
        "s3fs": lambda start, stop: files.cat_file(f"{bucket}/{OBJECT}", start=start, end=stop),
        "obstore": lambda start, stop: obstore.get_range(bare, OBJECT, start=start, end=stop),
        "our store": lambda start, stop: store.read_ranges(OBJECT, [(start, stop)])[0],
    }


def timed(read: Read, starts: list[int], size: int, num_threads: int) -> Measured:
    cpu_before, before = cpu_s(), time.perf_counter()
    with ThreadPoolExecutor(num_threads) as threads:
        sizes = set(threads.map(lambda start: len(read(start, start + size)), starts))
    seconds, cpu = time.perf_counter() - before, cpu_s() - cpu_before
    assert sizes == {size}
    return Measured(len(starts) / seconds, cpu / len(starts) * 1000)


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def show(found: dict[tuple[str, int], list[Measured]]) -> None:
    rounds = len(next(iter(found.values())))
    table = Table(
        title=f"Ranged reads, {os.cpu_count()} cores, Python {platform.python_version()}, n = {rounds}: median [min, max]"
    )
    for column in ("way", "bytes", "requests/s", "times s3fs", "MB/s", "CPU ms/request"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for (name, size), runs in sorted(found.items(), key=lambda item: -item[0][1]):
        rate, cpu = ([getattr(run, field) for run in runs] for field in Measured._fields)
        ratios = [run.requests_per_s / base.requests_per_s for run, base in zip(runs, found["s3fs", size], strict=True)]
        mb_per_s = f"{statistics.median(rate) * size / 1e6:.0f}"
        table.add_row(name, f"{size:,}", spread(rate, 0), spread(ratios, 2), mb_per_s, spread(cpu, 2))
    Console(width=120).print(table)


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


if __name__ == "__main__":
    main()
