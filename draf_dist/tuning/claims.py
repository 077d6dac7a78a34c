"""Claims on run folders: two trials of one campaign may need the same run, and only one of them may train there at a time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from draf_dist.errors import InterruptedRunError, explain

if TYPE_CHECKING:
    # The actor's process imports this file, and needs no torch.
    from draf_dist.training.run import StopRequest

ASK_INTERVAL_S = 0.3


@dataclass
class ClaimBook:
    """Who holds which run; the holders are numbers of trials."""

    holders: dict[str, int] = field(default_factory=dict)

    def take(self, run: str, trial: int) -> bool:
        """Gives the run to the trial unless another one holds it; says whether the trial holds it now."""
        return self.holders.setdefault(run, trial) == trial

    def release(self, run: str, trial: int) -> None:
        """Takes the run back, if it is this trial that holds it."""
        if self.holders.get(run) == trial:
            del self.holders[run]

    def release_all(self, trial: int) -> None:
        """Takes back whatever the trial holds: it has ended, maybe without a word."""
        self.holders = {run: holder for run, holder in self.holders.items() if holder != trial}


@dataclass(frozen=True)
class Claims:
    """The book, as seen from any process of the cluster; it is gone with the driver."""

    actor: Any

    @classmethod
    def open(cls) -> "Claims":
        """A new book on the node of this process."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(ClaimBook).options(num_cpus=0, scheduling_strategy=here).remote()
        return cls(actor)

    @contextmanager
    def held(self, run: str, trial: int, stop: "StopRequest") -> Iterator[None]:
        """Holds a run; waits for it where another trial trains there.

        Raises:
            InterruptedRunError: it was asked to stop meanwhile.
        """
        while not ray.get(self.actor.take.remote(run, trial)):
            if stop.requested:
                remedy = "The same command continues."
                raise InterruptedRunError(explain(run, expected="to wait for it", found=stop.requested, remedy=remedy))
            time.sleep(ASK_INTERVAL_S)
        try:
            yield
        finally:
            self.actor.release.remote(run, trial)

    def release_all(self, trial: int) -> None:
        """Takes back whatever a trial holds."""
        ray.get(self.actor.release_all.remote(trial))

    def close(self) -> None:
        """Ends the actor."""
        ray.kill(self.actor)
