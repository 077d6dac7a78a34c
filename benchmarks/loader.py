"""Loaders side by side: ours, MosaicML Streaming, LitData, webdataset, raw files, and what decoding alone allows.

    python benchmarks/loader.py [--rounds 5] [--settings local s3 s3-proxy s3-latency s3-latency-cap] [--arms ...] [--images 4000]
        [--folder DIR] [--json FILE] [--quick]

The same JPEGs for all, shards of 7 MiB, one decoder (simplejpeg), uint8, no transform, batches of 64, two worker processes or two
threads, shuffled as each tool recommends. Every run is a process of its own with an empty cache folder; its first epoch is cold,
its second one warm. Rounds are interleaved: every arm runs once in every setting, then all again, beginning with another arm. The
rules, and how to read the tables: docs/benchmarks.md. The peers are in benchmarks/requirements-peers.txt; one that is not installed
is said to be.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from loader_child import Result, child
from loader_data import DataFacts, card, make_data
from loader_job import BATCH, BUCKET, SHARD_BYTES, WORKERS, Job
from loader_report import Figures, Run, abouts, print_tables, ratios
from loader_run import MODULES
from loader_server import MeteredS3, client_environment, read_all, upload
from rich.console import Console
from tcp_proxy import HOST, TcpProxy

LATENCY_S, CAP_BYTES_PER_S = 0.02, 50e6
PROXIES = (("s3-proxy", 0.0, None), ("s3-latency", LATENCY_S, None), ("s3-latency-cap", LATENCY_S, CAP_BYTES_PER_S))
SETTINGS = ("local", "s3", "s3-proxy", "s3-latency", "s3-latency-cap")
# Behind a proxy the first epoch is the question: the second one reads the cache, and says what `s3` says.
COLD_ONLY = ("s3-proxy", "s3-latency", "s3-latency-cap")
# What would only take time. A cache is of no use on the local disk, nor in one epoch. Behind latency MosaicML ended with an
# IndexError or handed out 63 images/s. The proxy without latency is there to hold ours behind latency against.
LEFT_OUT = {
    "local": ("webdataset-stream",),
    "s3": (),
    "s3-proxy": ("webdataset", "webdataset-stream", "raw", "ours-joint", "mosaicml", "litdata"),
    "s3-latency": ("webdataset", "raw", "ours-joint", "mosaicml"),
    "s3-latency-cap": ("webdataset", "raw", "ours-joint", "mosaicml"),
}
QUICK_ARMS, QUICK_IMAGES = ("ours", "webdataset", "decode"), 256
# Part of the data that an arm reads, and the arms that have to write it first.
OWN_COPY = {"mosaicml": "mds", "litdata": "litdata"}
RELEASE_OF = {"ours": "wds", "ours-joint": "joint"}
PROCESS_FIGURES = ("import_s", "first_batch_with_import_s", "own_peak_rss_mib")
LOCAL_ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
console = Console(width=200 if not sys.stdout.isatty() else None)


@dataclass(frozen=True)
class Place:
    """Where the runs of a setting find the data, and what they need in their environment."""

    bucket: str
    metrics: str
    environment: dict[str, str]


def main() -> None:
    options = parse()
    # Ended from outside it must end what it has started, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    started = time.monotonic()
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loader-benchmark-")))
        folder = folder.absolute()
        facts = make_data(folder, options.images)
        failed = write_copies(folder, options.arms)
        places = open_places(stack, folder, options)
        failed |= prepare_ours(folder, options.arms, places)
        console.print(f"data and servers ready after {time.monotonic() - started:.0f} s: {facts}", highlight=False)
        runs = list(all_rounds(options, folder, places, facts, failed))
    seconds = time.monotonic() - started
    cap_images_per_s = CAP_BYTES_PER_S / facts.mean_jpeg_bytes
    print_tables(console, runs, cap_images_per_s)
    console.print(f"{len(runs)} runs in {seconds:.0f} s; the cap of 50 MB/s allows {cap_images_per_s:,.0f} images/s")
    if options.json is not None:
        options.json.write_text(json.dumps(report(options, facts, runs, seconds), indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--arms", nargs="+", choices=MODULES)
    parser.add_argument("--images", type=int)
    parser.add_argument("--folder", type=Path, help="keep the data here for another time; default: a folder that is removed")
    parser.add_argument("--json", type=Path, help="every run's figures, versions, settings, bytes and the machine")
    parser.add_argument("--quick", action="store_true", help="one round of a few images on the local disk, to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    options.settings = options.settings or (["local"] if options.quick else list(SETTINGS))
    options.arms = options.arms or list(QUICK_ARMS if options.quick else MODULES)
    options.images = options.images or (QUICK_IMAGES if options.quick else 4_000)
    return options


def write_copies(folder: Path, arms: Sequence[str]) -> dict[str, Result]:
    """Every peer's own copy of the data, by its own writer; arm -> why not, of those that have none."""
    failed = {}
    for arm in arms:
        out = folder / OWN_COPY.get(arm, "")
        if arm in OWN_COPY and not (out / "index.json").exists():
            result = child(["--write", arm, str(folder), str(out)], LOCAL_ENVIRONMENT)
            if result.outcome != "ok":
                failed[arm] = result
    return failed


def open_places(stack: ExitStack, folder: Path, options: argparse.Namespace) -> dict[str, Place]:
    """Setting -> place: reads all data once, starts the S3 server and the proxies that are needed."""
    read_all(folder)
    places = {
        setting: Place("", "", LOCAL_ENVIRONMENT) for setting in ("memory", "local") if setting in ("memory", *options.settings)
    }
    if any(setting.startswith("s3") for setting in options.settings):
        server = stack.enter_context(MeteredS3(Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))))
        parts = {part_of(arm) for arm in options.arms if (folder / part_of(arm)).is_dir()}
        upload(server, folder, sorted(parts))
        places["s3"] = s3_place(server, server.endpoint)
        for setting, latency_s, cap in PROXIES:
            proxy = stack.enter_context(TcpProxy(HOST, server.port, latency_s=latency_s, bytes_per_s=cap))
            places[setting] = s3_place(server, proxy.url)
    return places


def part_of(arm: str) -> str:
    """The part of the data that an arm reads."""
    return OWN_COPY.get(arm) or RELEASE_OF.get(arm) or ("raw" if arm in ("raw", "decode") else "wds")


def s3_place(server: MeteredS3, endpoint: str) -> Place:
    return Place(f"s3://{BUCKET}", server.metrics, LOCAL_ENVIRONMENT | client_environment(server, endpoint))


def prepare_ours(folder: Path, arms: Sequence[str], places: dict[str, Place]) -> dict[str, Result]:
    """The releases of our arms, whose tars are indexed where they lie; arm -> why not, of those that have none."""
    failed = {}
    for arm, place in ((arm, places[name]) for arm in arms if arm in RELEASE_OF for name in ("local", "s3") if name in places):
        base = place.bucket or str(folder)
        if not place.bucket:
            shutil.rmtree(folder / arm, ignore_errors=True)  # of another time, perhaps of another program
        path = folder / f"{arm}.yaml"
        path.write_text(card(joint=arm == "ours-joint"))
        command = [sys.executable, "-m", "draf_dist.cli.app", "prepare", str(path)]
        command += ["--from-webdataset", f"{base}/{RELEASE_OF[arm]}", "--out", f"{base}/{arm}", "--jobs", "2"]
        done = subprocess.run(command, env=place.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            failed[arm] = Result("crashed", f"draf prepare: {' '.join((done.stdout + done.stderr).split())}"[:500])
    return failed


def all_rounds(
    options: argparse.Namespace, folder: Path, places: dict[str, Place], facts: DataFacts, failed: dict[str, Result]
) -> Iterator[Run]:
    """Every arm in every setting, round after round, each round beginning with another arm."""
    for number in range(options.rounds):
        began = time.monotonic()
        arms = [arm for arm in options.arms if arm != "decode"]
        first = number % max(1, len(arms))
        turn = arms[first:] + arms[:first]
        jobs = [(setting, arm) for setting in options.settings for arm in turn if arm not in LEFT_OUT[setting]]
        jobs += [("memory", "decode")] if "decode" in options.arms else []
        for setting, arm in jobs:
            run = one_run(number, setting, arm, folder, places[setting], facts, failed.get(arm))
            _say(run)
            yield run
        console.print(f"round {number + 1} of {options.rounds}: {time.monotonic() - began:.0f} s", highlight=False)


def one_run(number: int, setting: str, arm: str, folder: Path, place: Place, facts: DataFacts, failed: Result | None) -> Run:
    with tempfile.TemporaryDirectory(dir=folder, prefix="cache-") as cache:
        job = Job(
            arm=arm,
            data=str(folder),
            bucket=place.bucket,
            cache=cache,
            epochs=1 if setting in COLD_ONLY else 2,
            seed=number,
            metrics=place.metrics,
            started=time.time(),
        )
        result = failed or child([job.to_json()], place.environment | {"DRAF_CACHE_DIR": str(Path(cache) / "draf")})
    if any(isinstance(found, dict) and found.get("unknown") for found in result.content.values()):
        result = replace(result, outcome="wrong", detail="images that are not in the data")
    about = {name: result.content[name] for name in ("versions", "settings") if name in result.content}
    return Run(number, setting, arm, result.outcome, result.detail, result.peak_pss_mib, derived(arm, result, facts, place), about)


def derived(arm: str, result: Result, facts: DataFacts, place: Place) -> dict[str, Figures]:
    """Phase -> figures, and under "process" what is told once a run."""
    phases: dict[str, Figures] = {}
    # What the bound does in its first epoch is to read the files into memory.
    for phase in ("warm",) if arm == "decode" else ("cold", "warm"):
        found = result.content.get(phase)
        if isinstance(found, dict):
            phases[phase] = found | {"cpu_per_1000": 1000 * found["cpu_s"] / found["images"]}
            if place.bucket:
                phases[phase]["bytes_over_data"] = found["bytes"] / facts.bytes_of["joint" if arm == "ours-joint" else "raw"]
    if phases:
        phases["process"] = {name: float(str(result.content[name])) for name in PROCESS_FIGURES}
    return phases


def _say(run: Run) -> None:
    rates = [f"{phase} {run.figures[phase]['images_per_s']:,.0f}" for phase in ("cold", "warm") if phase in run.figures]
    told = f"{', '.join(rates)} images/s" if rates else f"{run.outcome}: {run.detail}"
    console.print(f"  {run.round + 1} {run.setting:15} {run.arm:18} {told}", highlight=False)


def report(options: argparse.Namespace, facts: DataFacts, runs: Sequence[Run], seconds: float) -> dict[str, object]:
    """What --json writes."""
    return {
        "protocol": {
            "batch": BATCH,
            "workers": WORKERS,
            "shard_bytes": SHARD_BYTES,
            "latency_s": LATENCY_S,
            "cap_bytes_per_s": CAP_BYTES_PER_S,
            "rounds": options.rounds,
            "settings": options.settings,
        },
        "machine": machine(),
        "data": asdict(facts),
        "arms": abouts(runs),
        "seconds": seconds,
        "runs": [{name: value for name, value in asdict(run).items() if name != "about"} for run in runs],
        "ratios": [asdict(ratio) for ratio in ratios(runs)],
    }


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average_at_the_end": os.getloadavg(),
    }


if __name__ == "__main__":
    main()
