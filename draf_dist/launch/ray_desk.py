"""The desk: a small actor beside the driver, where it and the ranks leave word for one another.

Ranks say what the user should read, and who they are; the driver says that the run is to stop. Ray's controller says that workers
failed, and the driver whether it is to start them again.
"""

import io
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from draf_dist.launch.ray_elastic import RESTARTS

# How often a rank asks whether it is to stop: an answer takes about a millisecond, and is not waited for.
ASK_INTERVAL_S = 0.5
# How often Ray's controller asks what is to become of a failure: the driver looks every 0.2 s.
VERDICT_INTERVAL_S = 0.1


@dataclass(frozen=True)
class Arrival:
    """One rank that began. group: names its process group, so all ranks of one start of the workers share it.

    node: Ray's id of it; time: since 1970.
    """

    group: str
    rank: int
    pid: int
    node: str
    time: float


@dataclass
class Papers:
    """What lies on the desk."""

    lines: list[str] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)
    stop: str | None = None
    failures: list[str] = field(default_factory=list)
    verdicts: list[bool] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """Adds a line for the user."""
        self.lines.append(line)

    def lines_after(self, count: int) -> list[str]:
        """The lines that follow the first `count`."""
        return self.lines[count:]

    def arrive(self, arrival: Arrival) -> dict[str, str]:
        """Enters a rank, and hands it the environment that the driver lends."""
        self.arrivals.append(arrival)
        return self.environment

    def all_arrivals(self) -> list[Arrival]:
        """Every rank that ever began, in order."""
        return self.arrivals

    def lend(self, environment: dict[str, str]) -> None:
        """Keeps variables for the ranks."""
        self.environment = environment

    def ask_to_stop(self, reason: str) -> None:
        """Keeps the reason; one after which the run goes on takes no other's place."""
        if self.stop is None or reason not in RESTARTS:
            self.stop = reason

    def goes_on(self) -> bool:
        """Whether workers that have stopped are to start again; then the reason is forgotten."""
        if self.stop in RESTARTS:
            self.stop = None
        return self.stop is None

    def stop_reason(self) -> str | None:
        """Why the run is to stop, None while it is not."""
        return self.stop

    def fail(self, what: str) -> int:
        """Enters a failure; returns its number."""
        self.failures.append(what)
        return len(self.failures) - 1

    def open_failure(self) -> str | None:
        """The first failure without a verdict."""
        return self.failures[len(self.verdicts)] if len(self.verdicts) < len(self.failures) else None

    def decide(self, again: bool) -> None:
        """The verdict on that one: whether the workers are started again just as they were."""
        self.verdicts.append(again)

    def verdict(self, number: int) -> bool | None:
        """The verdict on a failure, None while there is none."""
        return self.verdicts[number] if number < len(self.verdicts) else None


@dataclass(frozen=True)
class Desk:
    """The desk, as seen from any process of the cluster; can be sent to another one."""

    actor: Any

    @classmethod
    def open(cls, environment: Mapping[str, str]) -> "Desk":
        """A new desk on the node of this process, gone with it.

        environment: variables for the ranks; they go from process to process, and are in no runtime environment and on no disk.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(Papers).options(num_cpus=0, scheduling_strategy=here).remote()
        ray.get(actor.lend.remote(dict(environment)))
        return cls(actor)

    def say(self, line: str) -> None:
        """A line for the user; not waited for."""
        self.actor.say.remote(line)

    def lines_after(self, count: int) -> list[str]:
        """The lines that follow the first `count`."""
        found: list[str] = ray.get(self.actor.lines_after.remote(count))
        return found

    def arrive(self, rank: int) -> dict[str, str]:
        """Says that this process is a rank that begins; returns the environment that the driver lends."""
        group = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        arrival = Arrival(group, rank, os.getpid(), ray.get_runtime_context().get_node_id(), time.time())
        lent: dict[str, str] = ray.get(self.actor.arrive.remote(arrival))
        return lent

    def arrivals(self) -> list[Arrival]:
        """Every rank that ever began, in order."""
        found: list[Arrival] = ray.get(self.actor.all_arrivals.remote())
        return found

    def pids(self) -> list[dict[int, int]]:
        """The process of every rank, for every start of the workers, oldest first."""
        return pids_by_start(self.arrivals())

    def ask_to_stop(self, reason: str) -> None:
        """Makes the run stop after the step in hand, with a checkpoint."""
        ray.get(self.actor.ask_to_stop.remote(reason))

    def stop_reason(self) -> str | None:
        """Why the run is to stop, None while it is not."""
        found: str | None = ray.get(self.actor.stop_reason.remote())
        return found

    def goes_on(self) -> bool:
        """Whether nobody has asked for its end; a request to stop in order to start again is forgotten."""
        found: bool = ray.get(self.actor.goes_on.remote())
        return found

    def wait_for_verdict(self, failure: str) -> bool:
        """Tells the driver that workers failed; returns whether they are to be started again as they were."""
        number = ray.get(self.actor.fail.remote(failure))
        found: bool | None = None
        while found is None:
            time.sleep(VERDICT_INTERVAL_S)
            found = ray.get(self.actor.verdict.remote(number))
        return found

    def open_failure(self) -> str | None:
        """A failure that waits for a verdict."""
        found: str | None = ray.get(self.actor.open_failure.remote())
        return found

    def decide(self, *, again: bool) -> None:
        """Gives it."""
        ray.get(self.actor.decide.remote(again))

    def close(self) -> None:
        """Ends the actor."""
        ray.kill(self.actor)


def pids_by_start(arrivals: list[Arrival]) -> list[dict[int, int]]:
    """Arrivals by process group, in order: {rank: pid} each."""
    starts: dict[str, dict[int, int]] = {}
    for arrival in arrivals:
        starts.setdefault(arrival.group, {})[arrival.rank] = arrival.pid
    return list(starts.values())


class DeskStop:
    """What a rank asks after every step: has the driver been told to stop?"""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._reason: str | None = None
        self._question: Any = None
        self._asked = 0.0

    @property
    def requested(self) -> str | None:
        """The reason, None while there is none. Never waits for the desk: an answer counts once it is there."""
        if self._reason is None and self._question is not None and ray.wait([self._question], timeout=0)[0]:
            self._reason = ray.get(self._question)
            self._question = None
        if self._reason is None and self._question is None and time.monotonic() - self._asked > ASK_INTERVAL_S:
            self._question = self._desk.actor.stop_reason.remote()
            self._asked = time.monotonic()
        return self._reason


class DeskLines(io.TextIOBase):
    """A text file whose lines go to the desk."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._begun = ""

    def write(self, text: str) -> int:
        """Sends every line that is whole."""
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            self._desk.say(line)
        return len(text)

    def drain(self) -> None:
        """Waits until everything sent has arrived."""
        self._desk.lines_after(0)
