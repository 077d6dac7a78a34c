"""Fifty epochs in one process, from a folder and from a bucket through the node cache: what it holds after each of them.

    python benchmarks/leak.py [--epochs 50] [--images 4000] [--json FILE]

An epoch is a training pass that goes on from the one before, and a validation pass of its own. Slopes are medians over all pairs of
epochs (Theil and Sen) after the first ten. Bounds: 1 MiB an epoch, no more files and threads than after ten epochs, none of its
threads after closing.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from reading_for_long import WARM_UP, Held, train_in_process
from reading_ranks import PROCESSES, Reader
from remote_release import own_release, put
from rich.console import Console
from rich.table import Table

from draf_dist.launch.local_s3 import LocalS3

COLUMNS = (
    "read from",
    "epochs",
    "samples/s",
    "MiB an epoch",
    "MiB at the end",
    "files",
    "threads",
    "holds",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.epochs <= WARM_UP + 2:
        parser.error(f"--epochs: more than {WARM_UP + 2}, the first {WARM_UP} warm up")
    table, found = Table(*COLUMNS, title=f"What {options.epochs} epochs of {options.images} images hold"), {}
    with tempfile.TemporaryDirectory() as name, LocalS3(Path(name) / "s3") as server:
        folder = Path(name)
        os.environ.update(server.environment, DRAF_CACHE_DIR=str(folder / "cache"), DRAF_CACHE_BYTES="2GB")
        own_release(folder / "release", options.images, 40, side=64)
        url = server.create_bucket("leak") + "/wards"
        put(folder / "release", url)
        for what, where in (("folder", str(folder / "release")), ("bucket", url)):
            started = time.monotonic()
            held = in_a_process(Reader(where, folder / "cache"), options.epochs)
            seconds = time.monotonic() - started
            found[what] = {**dataclasses.asdict(held), "mib_per_epoch": held.mib_per_epoch, "seconds": seconds}
            table.add_row(what, *row(held, seconds))
    Console(width=150).print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if not all(holds(Held(**{field.name: part[field.name] for field in dataclasses.fields(Held)})) for part in found.values()):
        sys.exit(1)


def in_a_process(reader: Reader, epochs: int) -> Held:
    """Nothing else is in its memory."""
    ours, theirs = PROCESSES.Pipe()
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "DRAF_"))}
    process = PROCESSES.Process(target=train_in_process, args=(reader, epochs, environment, theirs), daemon=True)
    process.start()
    theirs.close()
    held = ours.recv()
    process.join()
    assert isinstance(held, Held)
    return held


def holds(held: Held) -> bool:
    steady = all(max(counts[WARM_UP:]) <= max(counts[:WARM_UP]) + 2 for counts in (held.files, held.threads))
    return held.mib_per_epoch <= 1 and steady and not held.left


def row(held: Held, seconds: float) -> list[str]:
    counts = [f"{max(numbers[:WARM_UP])}, {max(numbers[WARM_UP:])}" for numbers in (held.files, held.threads)]
    rate, memory = sum(held.samples) / seconds, held.resident_bytes[-1] / 2**20
    return [
        str(len(held.samples)),
        f"{rate:,.0f}",
        f"{held.mib_per_epoch:+.3f}",
        f"{memory:.0f}",
        *counts,
        "yes" if holds(held) else "NO",
    ]


def _word(held: Held) -> str:
    return "yes" if holds(held) else "NO"


if __name__ == "__main__":
    main()
