"""Seconds of a checkpoint beside plain Ray Train + DeepSpeed: what training waits for, and what happens behind it.

    python benchmarks/checkpoint.py [--rounds 5] [--megabytes 10 100 500] [--folder DIR] [--json FILE]

One Ray Train job of two ranks over gloo, and a real S3 server on this machine. A state is parameters and both moments of Adam, in
f32, sharded by ZeRO 1. Three ways to save it, in the same processes and from the same DeepSpeed engine:
  ours        what `draf train` does: a copy into host memory; a thread sends ledger, metrics, TensorBoard and the checkpoint
  ray         Ray's guide for DeepSpeed: engine.save_checkpoint into a folder, and train.report with the folder
  ray-async   the same with checkpoint_upload_mode=ASYNC
Rounds are interleaved: every size and way saves and restores once, then all again, beginning with another. All the while both ranks
make steps of some other training, each ending in an all-reduce. Medians over rounds, the worst in brackets:
  stopped   training stands still; of that `copy` until the state is in host memory, or with Ray on the local disk
  slowed    how much longer the steps took that were made until the checkpoint was durable, together: training shares the cores
            with hashing, sending and, here, with the server
  stall     stopped + slowed, and as a share of an interval of 60 s
  durable   from the beginning until it can be restored; of that upload and commit (of ray-async: both)
  restore   reading and loading it, on all ranks; ours verifies every byte
Ratios are in pairs: ours over the other in the same round and size.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bucket_files import bucket_files
from checkpoint_ranks import Plan, of_plan
from checkpoint_report import ARMS, WORKERS, Measured, show
from rich.console import Console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 500])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--folder", type=Path, help="where the server and DeepSpeed's files lie")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.folder) as name:
        found = run(Path(name), tuple(options.megabytes), options.rounds, tuple(options.arms))
    show(found, Console(width=170 if not sys.stdout.isatty() else None))
    print(f"{options.rounds} rounds in {time.monotonic() - began:.0f} s")
    if options.json:
        machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "workers": WORKERS}
        options.json.write_text(json.dumps({**machine, "measured": [asdict(each) for each in found]}, indent=1))


def run(folder: Path, megabytes: tuple[int, ...], rounds: int, arms: tuple[str, ...]) -> list[Measured]:
    """All that was measured, as the first rank saw it."""
    # After the options are read: --help does not wait for Ray.
    from ray import train
    from ray.train.torch import TorchTrainer

    from draf_dist.launch.local_s3 import LocalS3
    from draf_dist.launch.profile import RayProfile
    from draf_dist.launch.ray_cluster import ray_cluster

    with LocalS3(folder / "s3") as server:
        # The ranks inherit it.
        os.environ.update(server.environment)
        ours, rays = server.create_bucket("ours"), server.create_bucket("ray")
        (folder / "tmp").mkdir()
        plan = Plan(ours, str(folder / "tmp"), megabytes, rounds, arms)
        with ray_cluster(RayProfile(workers=WORKERS)):
            ranks: Any = of_plan(plan)
            trainer = TorchTrainer(
                ranks,
                scaling_config=train.ScalingConfig(num_workers=WORKERS),
                run_config=train.RunConfig(
                    name="run",
                    storage_path=f"{rays.removeprefix('s3://')}/results",
                    storage_filesystem=bucket_files(server.environment),
                    checkpoint_config=train.CheckpointConfig(num_to_keep=1),
                ),
            )
            result: Any = trainer.fit()
            found: list[Measured] = result.return_value
            return found


if __name__ == "__main__":
    main()
