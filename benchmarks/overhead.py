"""What Ray, DeepSpeed and the run folder cost: `draf train` on one Ray worker beside a plain torch loop on the same batches.

    python benchmarks/overhead.py [--rounds 5] [--steps 30] [--json FILE]

DRAF on the images of the synthetic hospitals, a series and a table, 64 studies a step; the same model, objective, order and
loader. The plain loop is what one would write by hand: forward, backward, clip_grad_norm_, AdamW, in one process. Rounds are
interleaved and every run is a process of its own; the first steps of a run are left out. A step of ours is its median, and with it
the share of what no step was charged with (metrics, ledger, progress). Ratios are in pairs; wanted is a ratio of at most 1.05.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

JOB = Path(__file__).resolve().parent.parent / "jobs" / "finetune_synth.yaml"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
# Wider than the demo's: a step of a few hundred milliseconds.
ENCODER = "{kind: image2d, widths: [32, 64, 128], dropout: 0.05, projection_dropout: 0.1}"
PROFILE = "kind: ray\nworkers: 1\nthreads: 1\ndeepspeed: {kind: deepspeed, zero_stage: 1}\n"
BATCH, LEFT_OUT = 64, 5
console = Console(width=120 if not sys.stdout.isatty() else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain is not None:
        print(json.dumps(list(plain_steps(options.plain, options.steps))))
        return
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        rounds = [one_round(Path(folder), number, options.steps) for number in make_ready(Path(folder), options.rounds)]
    report(rounds)
    if options.json is not None:
        options.json.write_text(json.dumps({"rounds": rounds, "batch": BATCH, "steps": options.steps}, indent=1) + "\n")


def make_ready(folder: Path, rounds: int) -> range:
    """A release of the synthetic hospitals and the profile."""
    synth = folder / "synth"
    draf("synth", str(synth), "--sites", "4", "--subjects", "1600")
    draf("prepare", str(synth / "card.yaml"), "--raw", str(synth / "raw"), "--out", str(folder / "release"))
    (folder / "profile.yaml").write_text(PROFILE)
    return range(rounds)


def one_round(folder: Path, number: int, steps: int) -> dict[str, float]:
    """Seconds a step of both, beginning with one and the other in turn."""
    turns = ("plain", "ours") if number % 2 else ("ours", "plain")
    seconds = {turn: (ours if turn == "ours" else plain)(folder, number, steps) for turn in turns}
    seconds["ratio"] = seconds["ours"] / seconds["plain"]
    console.print(f"  {number + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in seconds.items()), highlight=False)
    return seconds


def ours(folder: Path, number: int, steps: int) -> float:
    """Ends by itself after `steps`: interrupted, as a run of whole epochs would be longer."""
    out = folder / f"run-{number}"
    settings = job_settings(folder) | {"name": f"run_{number}", "epochs": 1, "checkpoint.every_steps": 10**6}
    arguments = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    draf("train", str(JOB), "--profile", str(folder / "profile.yaml"), "--out", str(out), *arguments)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    taken = [line["wait_s"] + line["compute_s"] for line in lines if line["event"] == "step"][:steps]
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    idle = sum(line.get("seconds", {}).get("idle", 0.0) for line in ledger)
    num_steps = sum(line["event"] == "step" for line in lines)
    return statistics.median(taken[LEFT_OUT:]) + idle / num_steps


def plain(folder: Path, number: int, steps: int) -> float:
    command = [sys.executable, __file__, "--plain", str(folder), "--steps", str(steps)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return statistics.median(json.loads(done.stdout.splitlines()[-1])[LEFT_OUT:])


def job_settings(folder: Path) -> dict[str, object]:
    return {"release": folder / "release", "batch_size": BATCH, "model.encoders.image": ENCODER}


def plain_steps(folder: Path, steps: int) -> Iterator[float]:
    """The loop that one would write by hand: seconds of every step, waiting for its batch included."""
    from draf_dist.data.release import open_release
    from draf_dist.training.jobs import load_job
    from draf_dist.training.pin import pin
    from draf_dist.training.run import ONE_PROCESS
    from draf_dist.training.stages import build_stage

    torch.set_num_threads(1)
    job = pin(load_job(JOB, [f"{name}={value}" for name, value in job_settings(folder).items()]))
    stage = build_stage(job, open_release(job.release), ONE_PROCESS)
    rules, model = stage.rules(ONE_PROCESS), stage.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.optimizer.learning_rate, weight_decay=job.optimizer.weight_decay)
    began = time.perf_counter()
    for step, batch in stage.loader(ONE_PROCESS).batches(0, steps):
        prepared = rules.prepare(batch)
        terms = stage.objective(model, prepared, rules.keys(prepared))
        loss = sum(term.scale * term.numerator / term.weight.clamp(min=1.0) for term in terms.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rules.learning_rate(step)
        optimizer.step()
        ended = time.perf_counter()
        yield ended - began
        began = ended


def report(rounds: list[dict[str, float]]) -> None:
    ratios = sorted(found["ratio"] for found in rounds)
    table = Table(title=f"seconds a step, {BATCH} studies; medians over {len(rounds)} rounds")
    for name in ("plain torch", "Ray + DeepSpeed", "ratio", "least to greatest"):
        table.add_column(name, justify="right")
    middle = {name: statistics.median(found[name] for found in rounds) for name in ("plain", "ours", "ratio")}
    table.add_row(*(f"{middle[name]:.4f}" for name in ("plain", "ours", "ratio")), f"{ratios[0]:.3f} to {ratios[-1]:.3f}")
    console.print(table)


def draf(*arguments: str) -> None:
    command = [sys.executable, "-m", "draf_dist.cli.app", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"draf {' '.join(arguments)}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
