"""Pre-training throughput: SimCLR by `draf` beside a plain torch loop on the same images, as a share of the device's matrix rate.

    python benchmarks/simclr.py [--rounds 9] [--steps N] [--batch N] [--json FILE]

On a GPU: 224 x 224, an encoder of ResNet-50 class, bf16. Without one: 64 x 64 and a small encoder, fp32 and bf16. An image counts
once, whatever the number of views. Ours is the training loop with ZeRO 1 in one rank; images come from a release through the loader
(`loader`), or lie on the device already (`device`); the plain loop gets the same batches. Rounds are interleaved; a round's first
steps, which use up what was loaded ahead, are left out. Medians over rounds, ratios in pairs. Then where the time of a step goes.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
# DeepSpeed asks for it when it is imported.
os.environ["DS_ACCELERATOR"] = DEVICE.type

import torch.distributed as dist  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from simclr_plain import CLIP_NORM, LEARNING_RATE, TAU, WEIGHT_DECAY, PlainLoop  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from draf_dist.augment import ViewsConfig  # noqa: E402
from draf_dist.data.prepare import prepare  # noqa: E402
from draf_dist.data.release import Release  # noqa: E402
from draf_dist.objectives.pretrain_simclr import SimclrObjective  # noqa: E402
from draf_dist.schema.batch import Batch  # noqa: E402
from draf_dist.schema.label import LabelSpec  # noqa: E402
from draf_dist.schema.modality import DataSchema, ImageSpec  # noqa: E402
from draf_dist.schema.study import Rejection, Study  # noqa: E402
from draf_dist.sources.base import SourceCounts  # noqa: E402
from draf_dist.training.deepspeed_config import DeepSpeedConfig  # noqa: E402
from draf_dist.training.deepspeed_engine import DeepSpeedRanks  # noqa: E402
from draf_dist.training.loop import train_steps  # noqa: E402
from draf_dist.training.pretrain import Pretraining, build_pretraining, new_network  # noqa: E402
from draf_dist.training.pretrain_job import PretrainJob  # noqa: E402
from draf_dist.training.repeatable import repeatable  # noqa: E402
from draf_dist.training.schedule import EarlyStopping  # noqa: E402
from draf_dist.training.state import TrainState  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FEEDS = ("loader", "device")
# More than the loader has ready.
LEFT_OUT = 6
ON_DEVICE = 4
console = Console(width=132 if not sys.stdout.isatty() else None)


@dataclass(frozen=True)
class Size:
    """What is run on a kind of device. matrix: side of the products by which its rate is measured."""

    side: int
    widths: tuple[int, ...]
    width: int
    batch: int
    steps: int
    studies: int
    matrix: int
    precisions: tuple[str, ...]


SIZES = {
    "cuda": Size(224, (64, 128, 256, 512, 1024), 256, 256, 20, 4096, 8192, ("bf16",)),
    "cpu": Size(64, (16, 32, 64), 32, 16, 10, 256, 1024, ("fp32", "bf16")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = SIZES[DEVICE.type]
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=size.steps)
    parser.add_argument("--batch", type=int, default=size.batch)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="simclr-") as folder, process_group(Path(folder)):
        release = small_release(Path(folder), size)
        found = [measure(release, size, precision, options) for precision in size.precisions]
    for each in found:
        report(each)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder / 'group'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Images:
    """A source of smooth images with grain, one a study."""

    size: Size
    name: str = "images"
    held_out_sites: frozenset[str] = frozenset()
    public_subject_key: bool = False
    card_sha256: str = "0" * 64
    counts: SourceCounts = field(default_factory=SourceCounts)

    @property
    def schema(self) -> DataSchema:
        image = ImageSpec(name="image", height=self.size.side, width=self.size.side)
        return DataSchema(modalities=(image,), label=LabelSpec(name="none", classes=("no", "yes")), sites=("north", "south"))

    def studies(self) -> Iterator[Study | Rejection]:
        side, generator = self.size.side, np.random.default_rng(0)
        for number in range(self.size.studies):
            coarse = Image.fromarray(generator.integers(40, 216, (8, 8), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
            pixels = np.clip(smooth + generator.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
            site, label = self.schema.sites[number % 2], int(number % 7 == 0)
            yield Study(subject=str(number), site=site, anchor="2020-01-01", inputs={"image": pixels[None]}, label=label)


def small_release(folder: Path, size: Size) -> Release:
    return prepare(Images(size), str(folder / "release"), subject_key=b"the key of a benchmark")


def job_of(release: Release, size: Size, batch: int) -> PretrainJob:
    tree = {
        "name": "simclr",
        "release": release.pinned_url,
        "objective": {"kind": "simclr", "modality": "image", "tau": TAU},
        "encoder": {"kind": "image2d", "widths": size.widths},
        "width": size.width,
        "batch_size": batch,
        "epochs": 1000,
        "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM},
    }
    return PretrainJob.model_validate(tree)


@dataclass
class Arm:
    """One loop in steady state. step: one more of it; within: what is entered around every step; owners: what is timed, by part."""

    step: Callable[[], object]
    within: Callable[[], Any]
    parts: list[tuple[object, str, str]]

    def run(self, steps: int) -> float:
        """Seconds of so many steps."""
        with self.within():
            synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                self.step()
            synchronize()
            return time.perf_counter() - began


def ours(stage: Pretraining, backend: DeepSpeedRanks, batches: Iterable[tuple[int, Batch]]) -> Arm:
    module = new_network(stage.job, stage.release)
    engine, _ = backend.start(module, stage.job.optimizer)
    rules = stage.rules(backend)
    reports = train_steps(TrainState(0, EarlyStopping(patience=1)), engine, batches, stage.objective, rules)
    parts: list[tuple[object, str, str]] = [
        (ViewsConfig, "make", "views"),
        (engine.module, "forward", "forward"),
        (SimclrObjective, "couple", "loss"),
        (engine, "backward", "backward"),
        (engine, "step", "optimizer"),
    ]
    return Arm(lambda: next(reports), lambda: repeatable(1, DEVICE), parts)


def plain(stage: Pretraining, precision: str, batches: Iterable[tuple[int, Batch]]) -> Arm:
    loop = PlainLoop(new_network(stage.job, stage.release), DEVICE, DTYPES[precision])
    losses = loop.steps(stage.prepared(batch).inputs["image"] for _, batch in batches)  # type: ignore[misc]
    names = {"views": "views", "forward": "forward", "loss": "loss", "backward": "backward", "update": "optimizer"}
    return Arm(lambda: next(losses), nullcontext, [(loop, method, part) for method, part in names.items()])


def arms(stage: Pretraining, precision: str) -> dict[str, Arm]:
    """By name; each has parameters, optimizer and loader of its own."""
    backend = DeepSpeedRanks(DeepSpeedConfig.model_validate({"zero_stage": 1, "precision": precision}), DEVICE)
    lying = [batch.to(DEVICE) for _, batch in islice(stage.loader(backend).batches(), ON_DEVICE)]
    feeds: dict[str, Callable[[], Iterable[tuple[int, Batch]]]] = {
        "loader": lambda: stage.loader(backend).batches(),
        "device": lambda: ((step, lying[step % ON_DEVICE]) for step in count()),
    }
    made = {}
    for feed in FEEDS:
        made[f"ours, {feed}"] = ours(stage, backend, feeds[feed]())
        made[f"plain, {feed}"] = plain(stage, precision, feeds[feed]())
    return made


@dataclass(frozen=True)
class Found:
    """What was measured. images_s: arm -> of every round. busy, parts: of the arms with data on the device."""

    device: str
    precision: str
    side: int
    batch: int
    rounds: int
    steps: int
    gflop_forward: float
    gflop_image: float
    matrix_tflops: float
    images_s: dict[str, list[float]]
    busy: dict[str, float | None]
    parts: dict[str, dict[str, float]]


def measure(release: Release, size: Size, precision: str, options: argparse.Namespace) -> Found:
    job = job_of(release, size, options.batch)
    stage = build_pretraining(job, release, DeepSpeedRanks(DeepSpeedConfig(), DEVICE))
    forward, image = flops(stage, size.side)
    made = arms(stage, precision)
    names = list(made)
    speed: dict[str, list[float]] = {name: [] for name in names}
    matrix = []
    for number in range(options.rounds):
        matrix.append(matrix_rate(size.matrix, DTYPES[precision]))
        for name in names[number % len(names) :] + names[: number % len(names)]:
            made[name].run(LEFT_OUT)
            speed[name].append(options.batch * options.steps / made[name].run(options.steps))
    resident = [name for name in names if name.endswith("device")]
    step_s = {name: options.batch / statistics.median(speed[name]) for name in resident}
    return Found(
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu, one thread",
        precision=precision,
        side=size.side,
        batch=options.batch,
        rounds=options.rounds,
        steps=options.steps,
        gflop_forward=forward / 1e9,
        gflop_image=image / 1e9,
        matrix_tflops=statistics.median(matrix) / 1e12,
        images_s=speed,
        busy={name: busy_share(made[name], step_s[name]) for name in resident},
        parts={name: parts_of(made[name], options.steps) for name in resident},
    )


def flops(stage: Pretraining, side: int) -> tuple[float, float]:
    """Of the encoder and projection, counted by torch: one forward of one view; forward and backward of an image, two views."""
    loop = PlainLoop(new_network(stage.job, stage.release), DEVICE, torch.float32)
    images = torch.zeros(4, 1, side, side, device=DEVICE)
    with FlopCounterMode(display=False) as forward:
        embedding = loop.forward(images)
    with FlopCounterMode(display=False) as backward:
        loop.backward(embedding.sum())
    one, back = forward.get_total_flops() / 4, backward.get_total_flops() / 4
    return one, 2 * (one + back)


def matrix_rate(side: int, dtype: torch.dtype) -> float:
    """FLOP/s of a square product."""
    left, right = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    best, repeats = 0.0, 10 if DEVICE.type == "cuda" else 2
    for _ in range(3):
        synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            left @ right
        synchronize()
        best = max(best, 2 * side**3 * repeats / (time.perf_counter() - began))
    return best


def busy_share(arm: Arm, step_s: float) -> float | None:
    """Time in which a kernel runs, of that of a step. The profiler slows the host, not the kernels: steps are timed without it."""
    if DEVICE.type != "cuda":
        return None
    steps = 5
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        arm.run(steps)
    return covered(on_device(seen, torch.autograd.DeviceType.CUDA)) / 1e9 / steps / step_s


def on_device(seen: profile, kind: torch.autograd.DeviceType) -> Iterator[tuple[int, int]]:
    """Begin and end, in ns, of the kernels and copies of a kind of device."""
    for event in seen.profiler.kineto_results.events():
        # Spans that somebody has named hold the gaps between kernels too.
        if event.device_type() == kind and not event.is_user_annotation():
            yield event.start_ns(), event.start_ns() + event.duration_ns()


def covered(intervals: Iterable[tuple[int, int]]) -> int:
    """The length of the union."""
    total, reached = 0, 0
    for start, stop in sorted(intervals):
        total += max(0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def parts_of(arm: Arm, steps: int) -> dict[str, float]:
    """Shares of a step's time, waiting for the device after each part."""
    spent: Counter[str] = Counter()
    with ExitStack() as stack:
        for owner, method, part in arm.parts:
            stack.enter_context(timed(owner, method, part, spent))
        total = arm.run(steps)
    shares = {part: spent[part] / total for _, _, part in arm.parts}
    return {**shares, "rest": 1 - sum(shares.values())}


@contextmanager
def timed(owner: object, method: str, part: str, spent: Counter[str]) -> Iterator[None]:
    inner = getattr(owner, method)

    def outer(*arguments: Any, **named: Any) -> Any:
        synchronize()
        began = time.perf_counter()
        try:
            return inner(*arguments, **named)
        finally:
            synchronize()
            spent[part] += time.perf_counter() - began  # type: ignore[assignment]

    before = vars(owner).get(method)
    setattr(owner, method, outer)
    try:
        yield
    finally:
        setattr(owner, method, before) if before is not None else delattr(owner, method)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def report(found: Found) -> None:
    title = f"{found.device}, {found.precision}: {found.side} x {found.side}, batch {found.batch}; "
    title += f"{found.gflop_image:.2f} GFLOP an image ({found.gflop_forward:.3f} a forward of one view); "
    title += f"matrix rate {found.matrix_tflops:.3f} TFLOP/s; n = {found.rounds} rounds of {found.steps} steps"
    table = Table(title=title)
    for name in ("", "images/s", "least to greatest", "of matrix rate", "ours / plain, pairs", "least to greatest", "GPU busy"):
        table.add_column(name, justify="left" if not name else "right")
    for name, speed in found.images_s.items():
        middle = statistics.median(speed)
        share = middle * found.gflop_image / (found.matrix_tflops * 1e3)
        kind, _, feed = name.partition(", ")
        ratios = [a / b for a, b in zip(speed, found.images_s[f"plain, {feed}"], strict=True)] if kind == "ours" else []
        pairs = (f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}") if ratios else ("", "")
        busy = found.busy.get(name)
        spread = f"{min(speed):.1f} to {max(speed):.1f}"
        table.add_row(name, f"{middle:.1f}", spread, f"{share:.1%}", *pairs, "-" if busy is None else f"{busy:.1%}")
    console.print(table)
    parts = Table(title=f"{found.precision}: where a step's time goes, data on the device")
    parts.add_column("")
    for part in next(iter(found.parts.values())):
        parts.add_column(part, justify="right")
    for name, shares in found.parts.items():
        parts.add_row(name, *(f"{share:.1%}" for share in shares.values()))
    console.print(parts)


if __name__ == "__main__":
    main()
