"""What goes wrong between a loader and its bucket, for longer than the tests have time for, on a real S3 server on this machine.

    python benchmarks/chaos.py [--samples 2000] [--json FILE]

Storms begin in mid-epoch: bursts of 503, 500s, resets, short bodies, 30 s of silence (with the usual limit of 10 s), a server that
is stopped and started again. Errors: a corrupt object, expired credentials. The cache: at least 400 shards, 1.25 times the working
set, which is at most a quarter of the data, by one process and by two, on a good line and on a bad one. Ends: a rank that is
killed, a loader that is closed while the server is silent. Every line says what came of it; the program fails if it was not right.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fault_server import FaultServer
from faulty_line import (
    BEGIN,
    SMALL_BLOCKS,
    STORMS,
    Place,
    barely,
    drawn_at,
    fails,
    fetched_once_an_epoch,
    loader_threads,
    read_through,
    upload,
)
from reading_ranks import RankProcess, ranks, read, read_by_processes
from rich.console import Console
from rich.table import Table

from draf_dist.data import loader, pipeline, remote_shards
from draf_dist.data.bad_data import BadData
from draf_dist.data.release import Release, open_release
from draf_dist.errors import DataError, DrafError, UnreachableError
from draf_dist.launch.local_s3 import LocalS3

USUAL = (remote_shards.BLOCK_BYTES, pipeline.AHEAD_STEPS)
EPOCHS = 2
KILLS = 3
SILENCE: dict[str, Callable[[FaultServer], object]] = {
    "30 s stalls": lambda faults: [faults.stall(30, times=2), faults.stall(30, after_bytes=1000, times=2)],
}
LASTING: dict[str, Callable[[FaultServer], object]] = {
    "silent": lambda faults: faults.stall(300, times=None),
    "busy": lambda faults: faults.next(503, times=None),
    "gone": lambda faults: faults.reset(times=None),
}
Outcome = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="of the release in few shards; that in many has 5,000")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as name, LocalS3(Path(name) / "s3") as server:
        os.environ.update(server.environment)
        folder = Path(name)
        few, many = upload(server, folder / "few", options.samples, 40), upload(server, folder / "many", 5000, 500)
        for number, (what, (act, release)) in enumerate(cases(few, many).items()):
            with FaultServer(server.endpoint) as faults:
                os.environ["AWS_ENDPOINT_URL"] = faults.url
                found[what] = outcome(act, Place(*release, faults, server, folder / f"cache-{number}"), release is few)
            Console(width=150).print(f"{what}: {found[what]}")
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if not all(one["right"] for one in found.values()):
        sys.exit(1)


def cases(few: tuple[str, Release], many: tuple[str, Release]) -> dict[str, tuple[Callable[[Place], Outcome], tuple[str, Release]]]:
    storms = {name: (storm_case(begin), few) for name, begin in {**STORMS, **SILENCE}.items() if name != "stalls"}
    return {
        **storms,
        "server restarted": (restarted, few),
        "corrupt object": (corrupt, few),
        "corrupt object, quarantine": (quarantined, few),
        "expired credentials": (expired, few),
        "small cache": (small_cache, many),
        "small cache, 2 processes": (small_cache_of_two, many),
        "small cache, bad line": (small_cache_on_a_bad_line, many),
        "rank killed": (killed, few),
        **{f"closed, server {name}": (closed_case(begin), few) for name, begin in LASTING.items()},
    }


def outcome(act: Callable[[Place], Outcome], place: Place, has_few: bool) -> Outcome:
    """What came of a case: what it counted, how long it took, whether it was right."""
    started = time.monotonic()
    with blocks(*((SMALL_BLOCKS, 2) if has_few else USUAL)):
        try:
            counted = {"right": True, **act(place)}
        except (AssertionError, TimeoutError, DrafError, LookupError, ValueError) as error:
            counted = {"right": False, "why": f"{type(error).__name__}: {error}"[:200]}
    megabytes = place.faults.num_bytes(key=".tar") / 1e6
    return {"seconds": time.monotonic() - started, "requests": place.faults.num_requests(), "MB": megabytes, **counted}


@contextmanager
def blocks(block_bytes: int, ahead_steps: int) -> Iterator[None]:
    """Little is fetched ahead where things are to happen in mid-epoch."""
    loader.BLOCK_BYTES = remote_shards.BLOCK_BYTES = block_bytes
    pipeline.AHEAD_STEPS = ahead_steps
    yield


def outlasts(place: Place, happens: Callable[[], object]) -> Outcome:
    seen = read_through(place, happens)
    assert seen.rows == place.expected().rows, "other batches"
    assert seen.receipt(place.steps) == place.local.manifest.receipts["train"], "another receipt"
    assert seen.stats.retries > 0, "nothing happened"
    return {"retries": seen.stats.retries, "came": "the receipt"}


def storm_case(begin: Callable[[FaultServer], object]) -> Callable[[Place], Outcome]:
    return lambda place: outlasts(place, lambda: begin(place.faults))


def restarted(place: Place) -> Outcome:
    before = place.server.pid

    def restart() -> None:
        place.server.stop()
        threading.Timer(5, place.server.start).start()

    found = outlasts(place, restart)
    assert place.server.pid not in (None, before), "it was never stopped"
    return found


def corrupt(place: Place) -> Outcome:
    shard, byte, _, member = drawn_at(place, BEGIN + 8, "cxr")
    error, seen, _ = fails(place, lambda: place.faults.flip(byte, key=f"{shard}.tar"), DataError)
    assert shard in str(error)
    assert member in str(error)
    assert len(seen.rows) == BEGIN + 8
    return {"came": "an error that names shard and member"}


def quarantined(place: Place) -> Outcome:
    shard, byte, uid, _ = drawn_at(place, BEGIN + 8, "cxr")
    rule = BadData(policy="quarantine", limit=0.5)
    seen = read_through(place, lambda: place.faults.flip(byte, key=f"{shard}.tar"), bad_data=rule)
    pairs = zip(place.expected().rows.values(), seen.rows.values(), strict=True)
    assert {one[0] for expected, found in pairs for one in set(expected) - set(found)} == {uid}
    assert seen.stats.left_out == 1
    return {"came": "one member left out"}


def expired(place: Place) -> Outcome:
    error, _, seconds = fails(place, place.faults.deny, UnreachableError)
    assert "expired" in str(error)
    assert seconds < 10
    return {"came": f"an error after {seconds:.2f} s"}


def small_cache(place: Place) -> Outcome:
    reader = barely(place)
    steps = range(EPOCHS * reader.order(place.local).steps_per_epoch)
    seen = read(reader, open_release(place.url), steps)
    fetched_once_an_epoch(place, reader, seen, EPOCHS)
    return told(place, reader.limit_bytes, seen.stats.retries)


def small_cache_of_two(place: Place) -> Outcome:
    reader = replace(barely(place), world=2)
    steps = range(EPOCHS * reader.order(place.local).steps_per_epoch)
    seen = read_by_processes(reader, steps, lockstep=True, timeout_s=300)
    fetched_once_an_epoch(place, reader, seen, EPOCHS)
    return told(place, reader.limit_bytes, seen.stats.retries)


def small_cache_on_a_bad_line(place: Place) -> Outcome:
    place.faults.next(503, times=None, share=0.05, key=".tar")
    place.faults.reset(times=None, share=0.02)
    return small_cache_of_two(place)


def told(place: Place, limit_bytes: int, retries: int) -> Outcome:
    data = sum(shard.size_bytes for shard in place.local.shards("train"))
    ratio = place.faults.num_bytes(key=".tar") / data / EPOCHS
    return {"retries": retries, "came": f"the receipts, {ratio:.3f} times the data an epoch, cache {limit_bytes / data:.0%} of it"}


def killed(place: Place) -> Outcome:
    reader = place.reader(world=2)
    shares = [read(replace(reader, rank=rank), place.local, place.steps).rows for rank in range(2)]
    for number in range(KILLS):
        place.faults.slow(200_000, key=".tar")
        mine, step = replace(reader, cache=place.cache / str(number)), BEGIN + 5 * number
        with ranks(mine, place.steps) as (survivor, victim):
            victim.wait_for_step(step)
            victim.kill()
            place.faults.clear()
            successor = RankProcess(replace(mine, rank=1), place.steps[step:])
            assert survivor.result().rows == shares[0]
            assert successor.result().rows == {at: shares[1][at] for at in place.steps[step:]}
    return {"came": f"the receipt, {KILLS} times"}


def closed_case(begin: Callable[[FaultServer], object]) -> Callable[[Place], Outcome]:
    def closed(place: Place) -> Outcome:
        with closing(place.reader(prefetch=4).loader(open_release(place.url)).batches()) as batches:
            next(batches)
            begin(place.faults)
            time.sleep(1)
            started = time.monotonic()
        seconds = time.monotonic() - started
        place.faults.clear()
        while loader_threads() and time.monotonic() - started < 60:
            time.sleep(0.05)
        assert seconds < 5, f"{seconds:.1f} s"
        assert not loader_threads(), "threads are left"
        return {"came": f"the end after {seconds:.2f} s"}

    return closed


def show(found: dict[str, Outcome]) -> None:
    table = Table("what happens", "what comes", "seconds", "requests", "retries", "MB", "right")
    for what, one in found.items():
        figures = [f"{one['seconds']:.1f}", f"{one['requests']:,}", str(one.get("retries", "")), f"{one['MB']:.1f}"]
        table.add_row(what, one.get("came", one.get("why", "")), *figures, "yes" if one["right"] else "NO")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
