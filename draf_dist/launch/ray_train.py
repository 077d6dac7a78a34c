"""A run on the workers of a Ray cluster: Ray Train starts the ranks; the run folder holds the rest."""

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from rich.console import Console

import draf_dist
from draf_dist.errors import InterruptedRunError, SpecError, explain
from draf_dist.launch.cores import decode_threads_of
from draf_dist.launch.profile import RayProfile
from draf_dist.launch.ray_cluster import check_reach, environment, ray_cluster
from draf_dist.launch.ray_desk import Desk, DeskLines, DeskStop
from draf_dist.launch.ray_failures import FailureWatch
from draf_dist.launch.ray_starts import Starts
from draf_dist.training.backend import Backend
from draf_dist.training.interrupt import Interrupt
from draf_dist.training.jobs import AnyJob
from draf_dist.training.run import ONE_PROCESS, RUNS, RunResult, StopRequest, attempt, begin, check_fits

LENT = "AWS_"


@dataclass(frozen=True)
class RankTask:
    """What every rank is told. folder: the command's own, where all ranks are on its machine: relative paths mean the same."""

    url: str
    profile: RayProfile
    desk: Desk
    settings: dict[str, str]
    folder: str | None
    version: str = draf_dist.__version__


def train_on_ray(
    job: AnyJob,
    out: str | None,
    profile: RayProfile,
    *,
    fresh: bool = False,
    resume: bool = False,
    console: Console | None = None,
    watch: Callable[[Desk], None] = lambda desk: None,
) -> RunResult:
    """Begins or continues a run, and carries it to its end on the workers of a cluster (see ray_cluster and run.train).

    A worker that is lost costs the steps since the last checkpoint: all workers are started again, and continue from there; with
    fewer where a node is gone and the profile allows it, with more once one comes (see ray_starts). watch: is given the desk
    before the workers start (for whoever wants to know their processes).

    Raises:
        SpecError: the job, the run folder or the profile does not fit; a local folder, which only one of many nodes would see.
        InterruptedRunError: SIGINT or SIGTERM came; a checkpoint was written.
        UnreachableError: no cluster, or it went away.
        DrafError: whatever ended the run on any rank; or workers were lost too often. The same command continues.
    """
    console = console or Console(stderr=True)
    with ExitStack() as stack:
        folder = None if fresh else begin(job, out, resume=resume)
        if folder is not None and folder.end() is not None:
            return attempt(folder.url, ONE_PROCESS, console, Interrupt())
        check_fits(job, profile.workers, profile.deepspeed.accumulation)
        cluster = stack.enter_context(ray_cluster(profile))
        # Where workers wait for nodes, this one will not stay alone.
        alone = cluster.is_this_machine and (profile.address is None or cluster.places(profile.bundle) >= profile.workers)
        if not alone:
            check_reach(cluster.num_nodes, {"--out": out or RUNS, **job.reads})
        cluster.make_room(profile)
        folder = folder or begin(job, out, fresh=fresh, resume=resume)
        desk = Desk.open(_lent() if alone else {})
        stack.callback(desk.close)
        watch(desk)
        # Entered last: Ray sets signal handlers of its own when a cluster is joined.
        interrupt = stack.enter_context(Interrupt())
        here = str(Path.cwd()) if alone else None
        task = RankTask(folder.url, profile, desk, cluster.settings, here)
        return Starts(folder.url, profile, desk, console, interrupt, partial(_fit, task)).carry_out()


def run_rank(task: RankTask) -> RunResult | InterruptedRunError:
    """One rank, in a worker that has joined the process group.

    That it was interrupted is returned, not raised: Ray Train ends all ranks at the first exception, but waits for every one that
    returns, and the first rank may still be writing the checkpoint.
    """
    rank = train.get_context().get_world_rank()
    os.environ.update(task.desk.arrive(rank))
    if task.folder is not None:
        os.chdir(task.folder)
    _check_version(task.version)
    torch.set_num_threads(task.profile.threads)
    # DeepSpeed looks for an accelerator when it is imported.
    from draf_dist.training.deepspeed_engine import DeepSpeedRanks

    decode_threads = task.profile.decode_threads or decode_threads_of(train.get_context().get_local_world_size())
    backend = DeepSpeedRanks(task.profile.deepspeed, get_device(), task.profile.threads, decode_threads)
    if rank > 0:
        return _attempt(task.url, backend, Console(quiet=True), Interrupt())
    lines = DeskLines(task.desk)
    try:
        return _attempt(task.url, backend, Console(file=cast(IO[str], lines)), DeskStop(task.desk))
    finally:
        lines.drain()


def _attempt(url: str, backend: Backend, console: Console, stop: StopRequest) -> RunResult | InterruptedRunError:
    try:
        return attempt(url, backend, console, stop)
    except InterruptedRunError as error:
        return error


def _fit(task: RankTask, workers: int) -> object:
    """One start of so many workers, and those within Ray Train that follow it; what the first rank returned."""
    profile = task.profile
    # Nothing is reported to Ray, so nothing but an empty folder comes to lie there.
    with tempfile.TemporaryDirectory(prefix="draf-ray-train-") as storage, environment(_FIT | task.settings):
        # Ray's annotations are those of its first version: no value is returned there, and callbacks are Tune's.
        rank: Any = partial(run_rank, task)
        watch: Any = FailureWatch(task.desk)
        failure_config: Any = train.FailureConfig
        trainer = TorchTrainer(
            rank,
            torch_config=TorchConfig(timeout_s=profile.collective_timeout_s),
            scaling_config=train.ScalingConfig(
                num_workers=workers, use_gpu=profile.gpus_per_worker > 0, resources_per_worker=profile.bundle
            ),
            run_config=train.RunConfig(
                name="run",
                storage_path=storage,
                # Ours counts. Where not even a start succeeds, the driver looks again for how many there is room.
                failure_config=failure_config(max_failures=-1, controller_failure_limit=0),
                callbacks=[watch],
            ),
        )
        result: Any = trainer.fit()
        return result.return_value


def _lent() -> dict[str, str]:
    """The credentials of this process, which stay on this machine; the ranks of a larger cluster have the platform's."""
    return {name: value for name, value in os.environ.items() if name.startswith(LENT)}


def _check_version(driver: str) -> None:
    if driver != draf_dist.__version__:
        found = f"{draf_dist.__version__} there"
        remedy = "Install the same version on every node."
        raise SpecError(explain("cluster", expected=f"draf_dist {driver} on every node", found=found, remedy=remedy))


_FIT = {
    # A rank goes to the command's folder itself; and nobody reads these metrics.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
