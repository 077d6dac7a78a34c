"""What Ray, DeepSpeed and the run folder cost: `draf train` on one Ray worker beside a plain torch loop on the same batches.

    python benchmarks/overhead.py [--rounds 5] [--steps 30] [--pairs 20] [--json FILE]

DRAF on the images of the synthetic hospitals (64 x 64), a series and a table, 64 studies a step; the same model, objective, order,
loader and number of threads that decode. The plain loop is what one would write by hand: forward, backward, clip_grad_norm_, AdamW.

blocks      both in one process, the worker of Ray Train: ten steps of the one, ten of the other, and so on; the first of a block is
            left out. A step of ours is all the time from one to the next: books, watchdogs and asking whether to stop included
processes   every run a process of its own, interleaved: `draf train` on a cluster of its own, and the plain loop without any Ray.
            A step of ours is its median of wait_s + compute_s, and its share of the time that no step was charged with; the first
            five are left out
Ratios are in pairs, ours over plain; wanted is at most 1.05.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loader_report import median_interval
from overhead_blocks import BATCH, ENCODER, JOB, Blocks, job_of, of_blocks, plain_steps
from rich.console import Console
from rich.table import Table

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
PROFILE = "kind: ray\nworkers: 1\nthreads: 1\ndecode_threads: 2\ndeepspeed: {kind: deepspeed, zero_stage: 1}\n"
SUBJECTS, LEFT_OUT, BLOCK_STEPS = 1600, 5, 10
Pair = tuple[float, float]
console = Console(width=120 if not sys.stdout.isatty() else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of processes; 0 leaves them out")
    parser.add_argument("--steps", type=int, default=30, help="of a process")
    parser.add_argument("--pairs", type=int, default=20, help="of blocks; 0 leaves them out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain is not None:
        print(json.dumps(list(plain_steps(job_of(job_settings(options.plain)), options.steps))))
        return
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder = Path(name)
        make_ready(folder)
        found = {
            "blocks": in_blocks(folder, options.pairs) if options.pairs else [],
            "processes": [one_round(folder, number, options.steps) for number in range(options.rounds)],
        }
    report(found)
    if options.json is not None:
        about = {"batch": BATCH, "steps": options.steps, "block_steps": BLOCK_STEPS}
        options.json.write_text(json.dumps({**about, "plain_and_ours": found}, indent=1) + "\n")


def make_ready(folder: Path) -> None:
    """A release of the synthetic hospitals and the profile."""
    synth = folder / "synth"
    draf("synth", str(synth), "--sites", "4", "--subjects", str(SUBJECTS))
    draf("prepare", str(synth / "card.yaml"), "--raw", str(synth / "raw"), "--out", str(folder / "release"))
    (folder / "profile.yaml").write_text(PROFILE)


def job_settings(folder: Path) -> dict[str, object]:
    """What both have in common."""
    return {"release": folder / "release", "batch_size": BATCH, "model.encoders.image": ENCODER}


def run_settings(folder: Path, steps: int) -> dict[str, object]:
    """A run of at least so many steps, without a checkpoint within them."""
    epochs = -(-steps * BATCH // num_training(folder)) + 1
    return job_settings(folder) | {"epochs": epochs, "patience": epochs, "checkpoint.every_steps": 10**6}


def num_training(folder: Path) -> int:
    """Studies of the training split."""
    from draf_dist.data.release import open_release

    count: int = open_release(str(folder / "release")).manifest.receipts["train"].count
    return count


def in_blocks(folder: Path, pairs: int) -> list[Pair]:
    """Seconds a step of plain and ours, in one worker of Ray Train, pair by pair."""
    # After the options are read: --help does not wait for Ray.
    from ray import train
    from ray.train.torch import TorchTrainer

    from draf_dist.launch.profile import RayProfile
    from draf_dist.launch.ray_cluster import ray_cluster
    from draf_dist.launch.ray_desk import Desk
    from draf_dist.training.run import begin

    settings = run_settings(folder, 2 * pairs * BLOCK_STEPS)
    run = begin(job_of(settings), str(folder / "blocks"))
    with ray_cluster(RayProfile(workers=1)):
        ranks: Any = of_blocks(Blocks(run.url, settings, Desk.open({}), pairs, BLOCK_STEPS))
        where = train.RunConfig(name="run", storage_path=str(folder / "ray"))
        result: Any = TorchTrainer(ranks, scaling_config=train.ScalingConfig(num_workers=1), run_config=where).fit()
        found: list[Pair] = result.return_value
        return found


def one_round(folder: Path, number: int, steps: int) -> Pair:
    """Seconds a step of plain and ours, beginning with one and the other in turn."""
    measures: dict[str, Callable[[Path, int, int], float]] = {"plain": plain, "ours": ours}
    turns = sorted(measures, reverse=bool(number % 2))
    seconds = {turn: measures[turn](folder, number, steps) for turn in turns}
    console.print(f"  {number + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in seconds.items()), highlight=False)
    return seconds["plain"], seconds["ours"]


def ours(folder: Path, number: int, steps: int) -> float:
    """`draf train` to its end; the books say where its time went."""
    out = folder / f"run-{number}"
    settings = run_settings(folder, steps) | {"name": f"run_{number}"}
    arguments = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    draf("train", str(JOB), "--profile", str(folder / "profile.yaml"), "--out", str(out), *arguments)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    taken = [line["wait_s"] + line["compute_s"] for line in lines if line["event"] == "step"]
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    other_s = sum(line.get("seconds", {}).get("other", 0.0) for line in ledger)
    return statistics.median(taken[LEFT_OUT:steps]) + other_s / len(taken)


def plain(folder: Path, number: int, steps: int) -> float:
    """The plain loop in a process without Ray."""
    command = [sys.executable, __file__, "--plain", str(folder), "--steps", str(steps)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return statistics.median(json.loads(done.stdout.splitlines()[-1])[LEFT_OUT:])


def report(found: dict[str, list[Pair]]) -> None:
    """The table."""
    table = Table(title=f"seconds a step, {BATCH} studies; medians over n pairs")
    for name in ("", "plain torch", "Ray + DeepSpeed", "ratio", "interval", "least to greatest", "n"):
        table.add_column(name, justify="right")
    for name, pairs in found.items():
        if pairs:
            table.add_row(name, *cells(pairs), str(len(pairs)))
    console.print(table)


def cells(pairs: list[Pair]) -> list[str]:
    """Seconds of both, and what their ratios say."""
    ratios = [ours / plain for plain, ours in pairs]
    interval, (plain_s, ours_s) = median_interval(ratios), [statistics.median(values) for values in zip(*pairs, strict=True)]
    between = f"{interval.low:.3f} to {interval.high:.3f}"
    return [f"{plain_s:.4f}", f"{ours_s:.4f}", f"{interval.median:.3f}", between, f"{min(ratios):.3f} to {max(ratios):.3f}"]


def draf(*arguments: str) -> None:
    """One command.

    Raises:
        SystemExit: it failed; with what it printed.
    """
    command = [sys.executable, "-m", "draf_dist.cli.app", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"draf {' '.join(arguments)}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
