"""The plain arm of the ETTR benchmark: Ray Train + DeepSpeed as Ray's guides have it, a checkpoint after every epoch.

    python ettr_plain.py FOLDER WORKERS FOLDER_OF_RAY

Everything as Ray ships it, FailureConfig(max_failures=-1) excepted. The same model, loader, objective and engine as ours; the loop
is the one of draf_dist.training.loop, and nothing of the run folder. Rank 0 writes into FOLDER/plain.jsonl what is measured.
"""

import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bucket_files import bucket_files
from ray import train

STORAGE = "plain/results"


def rank(folder: Path, decode_threads: int) -> None:
    """The train function: epochs, each with validation and a checkpoint; after a failure on from the newest one."""
    from draf_dist.data.release import open_release
    from draf_dist.training.deepspeed_config import DeepSpeedConfig
    from draf_dist.training.deepspeed_engine import DeepSpeedRanks
    from draf_dist.training.jobs import load_job
    from draf_dist.training.loop import train_steps
    from draf_dist.training.schedule import EarlyStopping
    from draf_dist.training.stages import build_stage
    from draf_dist.training.state import TrainState

    torch.set_num_threads(1)
    backend = DeepSpeedRanks(DeepSpeedConfig(), torch.device("cpu"), decode_threads=decode_threads)
    job = load_job(folder / "job.yaml", [])
    stage = build_stage(job, open_release(job.release), backend)
    engine, files = backend.start(stage.model, job.optimizer)
    rules, loader, validation = stage.rules(backend), stage.loader(backend), stage.validation(backend)
    steps_per_epoch = stage.plan.order.steps_per_epoch
    first = restore(files.engine)
    book(folder, "attempt", start=first * steps_per_epoch)
    for epoch in range(first, job.epochs):
        begin, end = epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch
        state = TrainState(begin, EarlyStopping(patience=1))
        for report in train_steps(state, engine, loader.batches(begin, end), stage.objective, rules):
            book(folder, "step", seconds=report.wait_s + report.compute_s)
        numbers = stage.validate(engine.module, backend, validation)
        with tempfile.TemporaryDirectory() as name:
            files.engine.save_checkpoint(name, client_state={"epoch": epoch + 1})
            dist.barrier()
            train.report(numbers, checkpoint=train.Checkpoint.from_directory(name))
        book(folder, "commit", stop=end)


def restore(engine: Any) -> int:
    """Epochs done at the newest checkpoint, which is loaded; 0 where there is none."""
    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        _, client_state = engine.load_checkpoint(folder)
    return int(client_state["epoch"])


def book(folder: Path, event: str, **facts: float) -> None:
    """Adds a line to what the benchmark reads."""
    if dist.get_rank() == 0:
        with (folder / "plain.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, "time": time.time(), **facts}) + "\n")


def main() -> None:
    import ray
    from ray.exceptions import RayError
    from ray.train.torch import TorchTrainer

    from draf_dist.launch.cores import decode_threads_of
    from draf_dist.launch.ray_cluster import LOOPBACK, OBJECT_STORE_BYTES

    folder, workers = Path(sys.argv[1]), int(sys.argv[2])
    here = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "_node_ip_address": LOOPBACK}
    ray.init(address="local", _temp_dir=sys.argv[3], log_to_driver=False, **here)
    ranks: Any = partial(rank, folder, decode_threads_of(workers))
    while True:
        trainer = TorchTrainer(
            ranks,
            scaling_config=train.ScalingConfig(num_workers=workers),
            run_config=train.RunConfig(
                name="run",
                storage_path=STORAGE,
                storage_filesystem=bucket_files(os.environ),
                checkpoint_config=train.CheckpointConfig(num_to_keep=2),
                failure_config=train.FailureConfig(max_failures=-1),
            ),
        )
        # Ray Train itself gives up where a rank dies just when its function is launched: then somebody starts it again at once.
        with suppress(train.TrainingFailedError, RayError):
            trainer.fit()


if __name__ == "__main__":
    main()
