"""Tasks that fan out over a Ray cluster: the same as executor.py, with workers on all nodes."""

import signal
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from draf_dist.errors import DrafError
from draf_dist.executor import GRACE_S, TRIES, Failed, Outcome, ResultT, TaskT, attempt, unless_interrupted
from draf_dist.launch.profile import RayProfile
from draf_dist.launch.ray_cluster import check_reach, ray_cluster


@dataclass(frozen=True)
class RayExecutor:
    """As many tasks at a time as the profile has workers. shared: the URL where tasks read and write; all nodes must reach it."""

    profile: RayProfile
    shared: str

    def map(self, function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT]) -> Generator[Outcome[ResultT], None, None]:
        """See Executor.map.

        Raises:
            SpecError: no room for the workers; a local folder, which only one of many nodes would see.
            UnreachableError: no cluster.
        """
        if not tasks:
            return
        handler = signal.getsignal(signal.SIGTERM)
        with ray_cluster(self.profile) as cluster:
            if threading.current_thread() is threading.main_thread():
                # Ray has set one of its own; the command's own makes tasks write checkpoints first.
                signal.signal(signal.SIGTERM, handler)
            if not cluster.is_this_machine:
                check_reach(cluster.num_nodes, {"--out": self.shared})
            cluster.make_room(self.profile)
            yield from self._map(function, tasks)

    def _map(self, function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT]) -> Generator[Outcome[ResultT], None, None]:
        profile, waiting = self.profile, list(reversed(range(len(tasks))))
        # Ray itself starts a task again whose worker died; what a task raises it never sees.
        remote: Any = ray.remote(num_cpus=profile.cpus_per_worker, num_gpus=profile.gpus_per_worker, max_retries=TRIES - 1)(attempt)
        running: dict[ObjectRef[Any], int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < profile.workers:
                    index = waiting.pop()
                    running[remote.remote(function, index, tasks[index])] = index
                for ready in ray.wait(list(running))[0]:
                    yield unless_interrupted(_outcome(ready, running.pop(ready)))
        finally:
            _cancel(list(running))


def _outcome(ready: ObjectRef[Any], index: int) -> Outcome[ResultT]:
    try:
        outcome: Outcome[ResultT] = ray.get(ready)
    except RayError as error:
        return Failed(index, f"its Ray worker ended ({type(error).__name__})", DrafError.exit_code, str(error))
    return outcome


def _cancel(running: list[ObjectRef[Any]]) -> None:
    """Tells the tasks in hand, which training hears as SIGINT, and waits until they have written their checkpoints."""
    for task in running:
        ray.cancel(task)
    if running:
        ray.wait(running, num_returns=len(running), timeout=GRACE_S)
