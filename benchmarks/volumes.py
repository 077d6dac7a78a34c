"""3-D images: whole volumes, random patches and everything, by our own reader and by zarr, from a disk and from an S3 server.

64 volumes of 128 x 128 x 64 int16, chunks of 64 x 64 x 32, zstd-1 and crc32c, the protocol of zarr's own users:
    ours        data/volumes.py on the objects of a release (one array and shard a volume)
    zarr        zarr-python with its default codec pipeline, on the same objects
    zarrs       zarr-python with zarrs.ZarrsCodecPipeline, on the same objects
    zarr-one    zarr-python on one array of 64 volumes, 16 a shard
    zarrs-one   zarrs on that array
Arms are interleaved, every arm has as many calling threads and writes into an array that is there, arrays are opened and objects
read once before the clock starts. Ratios are of runs in the same round. CPU milliseconds are of this process, all threads.

    python benchmarks/volumes.py --rounds 5 --json volumes.json
"""

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from obstore.store import S3Store as Bucket
from zarr.buffer import default_buffer_prototype
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore as ZarrLocal
from zarr.storage import ObjectStore

from draf_dist.data.volumes import decode_patch, fetch_patch, open_pointer, plan_box
from draf_dist.data.volumes_write import encode_volume
from draf_dist.launch.local_s3 import LocalS3
from draf_dist.schema.modality import VolumeSpec
from draf_dist.schema.volume import VolumePointer
from draf_dist.storage import Store, open_store

NUM_VOLUMES, SHAPE, CHUNK, PATCH = 64, (64, 128, 128), (32, 64, 64), (32, 64, 64)
VOLUMES_A_SHARD = 16
SPEC = VolumeSpec(name="ct", spacing_mm=(1, 1, 1), patch=PATCH, chunk=CHUNK, fill=-1024, unit="HU")
PIPELINES = {"zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs": "zarrs.ZarrsCodecPipeline"}
MEASURES = ("volumes/s", "crops/s", "MB/s", "CPU ms a volume", "CPU ms a crop")
Box = tuple[int, tuple[int, int, int], tuple[int, int, int]]
Read = Callable[[Box], np.ndarray]
_rows = threading.local()


@dataclass(frozen=True)
class Arm:
    """One way to read. box: reads part of one volume. everything: reads all; None: box by box."""

    name: str
    box: Read
    everything: Callable[[], object] | None = None


@dataclass(frozen=True)
class Written:
    """Our volumes in a store. pointers: as a tar would hold them."""

    store: Store
    pointers: list[bytes]

    def box(self, where: Box) -> np.ndarray:
        """Part of one volume."""
        number, start, size = where
        out = _row(size)
        plan = plan_box(self.pointer(number), (0, *start), (1, *size))
        decode_patch(plan, fetch_patch(self.store, plan), out[None])
        return out

    def pointer(self, number: int) -> VolumePointer:
        """That of one volume, opened; from the cache after the first time."""
        return open_pointer(self.pointers[number], SPEC)

    @property
    def folders(self) -> list[str]:
        """Where the arrays lie in the store."""
        return [self.pointer(number).folder for number in range(len(self.pointers))]


def make_volumes() -> np.ndarray:
    """(64, 64, 128, 128) int16: a smooth body in air, and a scanner's noise."""
    generator = np.random.default_rng(0)
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, side, dtype=np.float32) for side in SHAPE), indexing="ij")
    volumes = np.empty((NUM_VOLUMES, *SHAPE), dtype=np.int16)
    for i in range(NUM_VOLUMES):
        phase, width = generator.uniform(0, 6, 3), generator.uniform(0.7, 0.95)
        body = 200 * np.sin(4 * d + phase[0]) * np.sin(5 * h + phase[1]) * np.sin(3 * w + phase[2])
        noisy = body + 20 * generator.standard_normal(SHAPE, dtype=np.float32)
        volumes[i] = np.where(h**2 + w**2 < width**2, noisy, -1024)
    return volumes


def write_ours(store: Store, volumes: np.ndarray) -> Written:
    """Writes the volumes as a release does."""
    pointers = []
    for volume in volumes:
        pointer, objects = encode_volume(volume[None], SPEC)
        for path, data in objects.items():
            store.write(path, data)
        pointers.append(pointer.model_dump_json().encode())
    return Written(store, pointers)


def zarr_arms(place: Callable[[str], Any], folders: list[str]) -> Iterator[Arm]:
    """zarr and zarrs, on one array a volume and on one for all. place: path -> a store of zarr."""
    for name, pipeline in PIPELINES.items():
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            arrays = [zarr.open_array(place(folder), mode="r") for folder in folders]
            whole = zarr.open_array(place("one.zarr"), mode="r")
        yield Arm(name, lambda where, arrays=arrays: _into(arrays[where[0]], (0, *_slices(where)), _row(where[2])))
        everything = np.empty((NUM_VOLUMES, *SHAPE), dtype=np.int16)
        yield Arm(
            f"{name}-one",
            lambda where, whole=whole: _into(whole, (where[0], *_slices(where)), _row(where[2])),
            lambda whole=whole, everything=everything: _into(whole, (slice(None),) * 4, everything),
        )


def _into(array: zarr.Array, selection: Any, out: np.ndarray) -> np.ndarray:
    array.get_basic_selection(selection, out=default_buffer_prototype().nd_buffer.from_numpy_array(out))
    return out


def _row(size: tuple[int, int, int]) -> np.ndarray:
    """An array of this thread, as a row of a batch: made once."""
    if getattr(_rows, "array", np.empty(0)).shape != size:
        _rows.array = np.empty(size, dtype=np.int16)
    array: np.ndarray = _rows.array
    return array


def _slices(where: Box) -> tuple[slice, ...]:
    return tuple(slice(first, first + length) for first, length in zip(where[1], where[2], strict=True))


def write_one(folder: Path, volumes: np.ndarray) -> None:
    """The array of all volumes."""
    array = zarr.create_array(
        folder,
        shape=volumes.shape,
        dtype="int16",
        chunks=(1, *CHUNK),
        shards=(VOLUMES_A_SHARD, *SHAPE),
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        fill_value=-1024,
    )
    array[...] = volumes


def boxes(num_crops: int, seed: int) -> tuple[list[Box], list[Box]]:
    """All volumes in a random order, and random patches of random volumes."""
    generator = np.random.default_rng(seed)
    whole: list[Box] = [(int(i), (0, 0, 0), SHAPE) for i in generator.permutation(NUM_VOLUMES)]
    crops: list[Box] = []
    for _ in range(num_crops):
        d, h, w = (int(generator.integers(0, side - length + 1)) for side, length in zip(SHAPE, PATCH, strict=True))
        crops.append((int(generator.integers(0, NUM_VOLUMES)), (d, h, w), PATCH))
    return whole, crops


def measure(arm: Arm, whole: list[Box], crops: list[Box], callers: int) -> dict[str, float]:
    """One run of an arm."""
    with ThreadPoolExecutor(callers) as pool:

        def seconds(work: list[Box]) -> tuple[float, float]:
            start, cpu = time.perf_counter(), time.process_time()
            for _ in pool.map(arm.box, work):
                pass
            return time.perf_counter() - start, time.process_time() - cpu

        (volumes_s, volumes_cpu_s), (crops_s, crops_cpu_s) = seconds(whole), seconds(crops)
        start = time.perf_counter()
        if arm.everything is not None:
            arm.everything()
        everything_s = time.perf_counter() - start if arm.everything is not None else volumes_s
    num_bytes = 2 * NUM_VOLUMES * math.prod(SHAPE)
    values = (len(whole) / volumes_s, len(crops) / crops_s, num_bytes / everything_s / 1e6)
    return dict(zip(MEASURES, (*values, 1e3 * volumes_cpu_s / len(whole), 1e3 * crops_cpu_s / len(crops)), strict=True))


def check(arms: list[Arm], volumes: np.ndarray, work: list[Box]) -> None:
    """Every arm reads what was written; also what warms caches and connections."""
    for arm in arms:
        for where in work:
            if not np.array_equal(arm.box(where), volumes[(where[0], *_slices(where))]):
                raise SystemExit(f"{arm.name} reads other voxels")


def run_place(arms: list[Arm], volumes: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all arms on one store."""
    check(arms, volumes, [*boxes(16, 0)[0], *boxes(16, 0)[1]])
    runs: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
    for number in range(args.rounds):
        whole, crops = boxes(args.crops, number)
        turn = number % len(arms)
        for arm in arms[turn:] + arms[:turn]:
            runs[arm.name].append(measure(arm, whole, crops, args.callers))
    return {"runs": runs, "ratios": ratios(runs)}


def ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Ours over the zarr arm with the best median, round by round."""
    found = {}
    for name in MEASURES:
        others = {arm: statistics.median(run[name] for run in done) for arm, done in runs.items() if arm != "ours"}
        is_rate = not name.startswith("CPU")
        best = (max if is_rate else min)(others, key=lambda arm: others[arm])
        pairs = zip((run[name] for run in runs["ours"]), (run[name] for run in runs[best]), strict=True)
        # Above 1: ours is the faster one.
        paired = [mine / theirs if is_rate else theirs / mine for mine, theirs in pairs]
        found[name] = {"best": best, "median": statistics.median(paired), "low": min(paired), "high": max(paired)}
    return found


def traffic_of_crops(written: Written, num_crops: int) -> dict[str, float]:
    """What the store handed out for random patches over the bytes of the chunks that they touch, and requests."""
    _, crops = boxes(num_crops, 99)
    touched = sum(plan_box(written.pointer(i), (0, *start), (1, *size)).touched_bytes for i, start, size in crops)
    before = written.store.traffic.snapshot()
    for where in crops:
        written.box(where)
    after = written.store.traffic.snapshot()
    return {
        "bytes_over_touched": (after.bytes_read - before.bytes_read) / touched,
        "requests_a_crop": (after.requests - before.requests) / num_crops,
    }


def table(place: str, found: dict[str, Any]) -> Iterator[str]:
    """Rows of markdown."""
    yield f"| {place} | " + " | ".join(MEASURES) + " |"
    yield "|---|" + "---|" * len(MEASURES)
    for arm, done in found["runs"].items():
        values = [[run[name] for run in done] for name in MEASURES]
        yield f"| {arm} | " + " | ".join(f"{statistics.median(v):.3g} ({min(v):.3g}-{max(v):.3g})" for v in values) + " |"
    cells = [
        f"{found['ratios'][name]['median']:.2f} ({found['ratios'][name]['low']:.2f}-{found['ratios'][name]['high']:.2f}) "
        f"of {found['ratios'][name]['best']}"
        for name in MEASURES
    ]
    yield "| ours against the best zarr | " + " | ".join(cells) + " |"
    if "traffic" in found:
        traffic = found["traffic"]
        yield f"Patches: {traffic['requests_a_crop']:.2f} requests and {traffic['bytes_over_touched']:.3f} of the touched bytes."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--crops", type=int, default=256, help="random patches a run")
    parser.add_argument("--callers", type=int, default=2, help="threads that read, for every arm")
    parser.add_argument("--places", nargs="+", choices=("local", "s3"), default=["local", "s3"])
    parser.add_argument("--json", type=Path, help="write every run's figures here")
    args = parser.parse_args()
    volumes = make_volumes()
    result: dict[str, Any] = {"settings": {**vars(args), "json": None}, "machine": machine(), "places": {}}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="draf-volumes-")))
        write_one(folder / "one.zarr", volumes)
        for place in args.places:
            result["places"][place] = measure_place(place, folder, volumes, args, stack)
            print("\n".join(table(place, result["places"][place])))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1))


def measure_place(place: str, folder: Path, volumes: np.ndarray, args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Writes everything to one store and measures all arms on it."""
    if place == "local":
        written = write_ours(open_store(str(folder / "release")), volumes)
        places = {name: folder / "release" / name for name in written.folders} | {"one.zarr": folder / "one.zarr"}
        others = zarr_arms(lambda path: ZarrLocal(places[path], read_only=True), written.folders)
        return run_place([Arm("ours", written.box), *others], volumes, args)
    server = stack.enter_context(LocalS3(folder / "s3"))
    os.environ.update(server.environment)
    store = open_store(server.create_bucket("volumes"))
    written = write_ours(store, volumes)
    for path in sorted(path for path in folder.glob("one.zarr/**/*") if path.is_file()):
        store.upload(path.relative_to(folder).as_posix(), path)

    def bucket(path: str) -> ObjectStore:
        client = Bucket("volumes", prefix=path, endpoint=server.endpoint, client_options={"allow_http": True})
        return ObjectStore(client, read_only=True)

    found = run_place([Arm("ours", written.box), *zarr_arms(bucket, written.folders)], volumes, args)
    return {**found, "traffic": traffic_of_crops(written, args.crops)}


def machine() -> dict[str, Any]:
    names = ("zarr", "zarrs", "obstore", "numcodecs", "numpy")
    return {"cpus": os.cpu_count(), "python": platform.python_version(), "versions": {name: version(name) for name in names}}


if __name__ == "__main__":
    main()
