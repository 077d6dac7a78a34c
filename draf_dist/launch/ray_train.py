"""A run on the workers of a Ray cluster: Ray Train starts the ranks, and again after a failure; the run folder holds the rest."""

import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
from ray import train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from rich.console import Console

import draf_dist
from draf_dist.errors import InterruptedRunError, SpecError, explain
from draf_dist.launch.cores import decode_threads_of
from draf_dist.launch.profile import RayProfile
from draf_dist.launch.ray_cluster import RayCluster, check_reach, environment, ray_cluster
from draf_dist.launch.ray_desk import Desk, DeskLines, DeskStop
from draf_dist.launch.ray_failures import FailureWatch, as_draf_error
from draf_dist.training.backend import Backend
from draf_dist.training.interrupt import Interrupt
from draf_dist.training.jobs import AnyJob
from draf_dist.training.run import ONE_PROCESS, RUNS, RunResult, StopRequest, attempt, begin

RELAY_INTERVAL_S = 0.2
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

    A worker that is lost costs the steps since the last checkpoint: all workers are started again, up to max_failures times, and
    continue from there. watch: is given the desk before the workers start (for whoever wants to know their processes).

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
        cluster = stack.enter_context(ray_cluster(profile))
        if not cluster.is_this_machine:
            check_reach(cluster.num_nodes, {"--out": out or RUNS, **job.reads})
        cluster.make_room(profile)
        folder = folder or begin(job, out, fresh=fresh, resume=resume)
        desk = Desk.open(_lent(cluster))
        stack.callback(desk.close)
        watch(desk)
        # Entered last: Ray sets signal handlers of its own when a cluster is joined.
        interrupt = stack.enter_context(Interrupt())
        here = str(Path.cwd()) if cluster.is_this_machine else None
        return _carry_out(RankTask(folder.url, profile, desk, cluster.settings, here), console, interrupt)


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


def _carry_out(task: RankTask, console: Console, interrupt: Interrupt) -> RunResult:
    """Ray Train in a thread, so that signals and the user's terminal stay with this one."""
    ended = _Ended()
    # A daemon: a second Ctrl-C ends this process at once.
    thread = threading.Thread(target=ended.after, args=(task,), daemon=True)
    thread.start()
    shown, asked = 0, False
    while thread.is_alive():
        thread.join(RELAY_INTERVAL_S)
        shown += _show(task.desk.lines_after(shown), console)
        if interrupt.requested and not asked:
            asked = True
            task.desk.ask_to_stop(interrupt.requested)
            if not task.desk.arrivals():
                raise _never_began(task.url, interrupt.requested)
            console.print("Stopping after the step in hand, with a checkpoint; a second signal ends at once.")
    _show(task.desk.lines_after(shown), console)
    if ended.error is not None:
        raise as_draf_error(ended.error, task.url, task.profile.max_failures) from ended.error
    if isinstance(ended.value, InterruptedRunError):
        raise ended.value
    assert isinstance(ended.value, RunResult)
    return ended.value


def _never_began(url: str, signal: str) -> InterruptedRunError:
    remedy = "The same command continues."
    return InterruptedRunError(explain(url, expected="workers to start", found=f"{signal} before any did", remedy=remedy))


@dataclass
class _Ended:
    """How Ray Train ended."""

    value: object = None
    error: Exception | None = None

    def after(self, task: RankTask) -> None:
        """Calls it and remembers."""
        try:
            self.value = _fit(task)
        except (train.TrainingFailedError, RayError) as error:
            self.error = error


def _fit(task: RankTask) -> object:
    profile = task.profile
    # Nothing is reported to Ray, so nothing but an empty folder comes to lie there.
    with tempfile.TemporaryDirectory(prefix="draf-ray-train-") as storage, environment(_FIT | task.settings):
        # Ray's annotations are those of its first version: no value is returned there, and callbacks are Tune's.
        rank: Any = partial(run_rank, task)
        watch: Any = FailureWatch(task.desk, profile.max_failures)
        trainer = TorchTrainer(
            rank,
            torch_config=TorchConfig(timeout_s=profile.collective_timeout_s),
            scaling_config=train.ScalingConfig(
                num_workers=profile.workers, use_gpu=profile.gpus_per_worker > 0, resources_per_worker=profile.bundle
            ),
            run_config=train.RunConfig(
                name="run",
                storage_path=storage,
                failure_config=train.FailureConfig(max_failures=profile.max_failures),
                callbacks=[watch],
            ),
        )
        result: Any = trainer.fit()
        return result.return_value


def _show(lines: list[str], console: Console) -> int:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return len(lines)


def _lent(cluster: RayCluster) -> dict[str, str]:
    """The credentials of this process, where they stay on this machine; the ranks of a larger cluster have the platform's."""
    return {name: value for name, value in os.environ.items() if name.startswith(LENT)} if cluster.is_this_machine else {}


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
