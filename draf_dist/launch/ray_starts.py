"""Starts of the workers, one after the other, until the run is over: with fewer where nodes are lost, with more where they come."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ray.exceptions import RayError
from ray.train import TrainingFailedError
from rich.console import Console

from draf_dist.errors import DrafError, InterruptedRunError, UnreachableError, explain
from draf_dist.launch.profile import RayProfile
from draf_dist.launch.ray_desk import Arrival, Desk
from draf_dist.launch.ray_elastic import PREEMPTION, RESIZE, Failures, Look, Steady, reason_to_stop, workers_to_start
from draf_dist.launch.ray_failures import as_draf_error, failed_start, gave_up, starts_again
from draf_dist.launch.ray_places import Places, give_back, leaving, lost, reserved
from draf_dist.training.interrupt import Interrupt
from draf_dist.training.run import RunResult
from draf_dist.training.run_folder import open_run

RELAY_INTERVAL_S = 0.2
LOOK_INTERVAL_S = 1.0
WAITING_TOLD_S = 5.0
LOST = "lost"
_TOLD = {
    LOST: "A node was lost: going on with {} from step {}.",
    PREEMPTION: "A node will be taken away: checkpoint at step {1}, going on with {0}.",
    RESIZE: "A node came: {} from step {}.",
}


@dataclass
class Starts:
    """Carries a run through its starts. fit: one start with so many workers, until they end; gives what the first rank returned."""

    url: str
    profile: RayProfile
    desk: Desk
    console: Console
    interrupt: Interrupt
    fit: Callable[[int], object]
    _failures: Failures = field(init=False)
    _shown: int = 0
    _began: int = 0
    _reserved: frozenset[str] = frozenset()
    _reason: str | None = None
    _gave_up: DrafError | None = None

    def __post_init__(self) -> None:
        self._failures = Failures(self.profile.max_failures)

    def carry_out(self) -> RunResult:
        """To its end.

        Raises:
            InterruptedRunError: it was asked to stop.
            DrafError: whatever else ended it.
        """
        while True:
            workers = self._wait_for_room()
            self._tell_why(workers)
            ended = self._start(workers)
            if isinstance(ended.value, RunResult):
                return ended.value
            goes_on = self.desk.goes_on()
            if ended.error is not None:
                self._after_error(ended.error)
            elif not goes_on:
                assert isinstance(ended.value, InterruptedRunError)
                raise ended.value

    def _wait_for_room(self) -> int:
        """Until enough workers fit; how many."""
        least, most = self.profile.least, self.profile.workers
        steady, began, told = Steady(), time.monotonic(), False
        with Places(self.profile.bundle, least, most) as places:
            while True:
                found, now = places.ready(), time.monotonic()
                workers = workers_to_start(found, steady.seen(found, now), least=least, most=most)
                if workers is not None:
                    return workers
                if self.interrupt.requested or self.desk.stop_reason():
                    raise self._never_began(self.interrupt.requested or "a request")
                if now - began > WAITING_TOLD_S and found < least and not told:
                    told = True
                    self._print(f"Waiting for room for {least} workers.")
                time.sleep(RELAY_INTERVAL_S)

    def _start(self, workers: int) -> "_Ended":
        """Ray Train in a thread, so that signals and the user's terminal stay with this one."""
        ended = _Ended()
        # A daemon: a second Ctrl-C ends this process at once.
        thread = threading.Thread(target=ended.after, args=(self.fit, workers), daemon=True)
        self._reserved = reserved()
        self._began = len(self.desk.arrivals())
        thread.start()
        with Places(self.profile.bundle, 0, self.profile.workers - workers) as more:
            watch = _Watch(more)
            while thread.is_alive():
                thread.join(RELAY_INTERVAL_S)
                self._relay()
                self._decide()
                self._look(watch)
        self._relay()
        return ended

    def _look(self, watch: "_Watch") -> None:
        """Asks the ranks to stop where the user or the cluster wants it."""
        if self.interrupt.requested:
            if not watch.interrupted:
                watch.interrupted = True
                self._interrupt(self.interrupt.requested)
        elif watch.asked is None and watch.is_due():
            ranks_on = frozenset(arrival.node for arrival in self._ranks())
            watch.asked = reason_to_stop(watch.look(ranks_on), pause_s=self.profile.resize_pause_s) if ranks_on else None
            if watch.asked is not None:
                self._reason = watch.asked
                self.desk.ask_to_stop(watch.asked)

    def _interrupt(self, signal: str) -> None:
        self.desk.ask_to_stop(signal)
        if not self._ranks():
            raise self._never_began(signal)
        self._print("Stopping after the step in hand, with a checkpoint; a second signal ends at once.")

    def _decide(self) -> None:
        """What becomes of workers that failed: started again as they were, with what is left of the nodes, or not at all."""
        failure = self.desk.open_failure()
        if failure is None:
            return
        nodes = {arrival.node for arrival in self._ranks()}
        gone, announced = lost(nodes), nodes & leaving()
        if gone:
            self._reason = PREEMPTION if gone <= announced else LOST
        # What was announced is no failure: it can't go on for ever without new nodes.
        if not announced:
            self._count(failure, "" if not gone else "Its node no longer answers. ")
        self.desk.decide(again=not gone and self._gave_up is None)

    def _count(self, failure: str, more: str) -> None:
        self._failures = self._failures.after(self._newest())
        if self._failures.are_too_many:
            self._gave_up = gave_up(self.url, self._failures.in_a_row, failure)
            return
        times = f"{self._failures.in_a_row} of at most {self.profile.max_failures} times without a new checkpoint"
        self._print(f"warning: {failure}. {more}Starting the workers again, {times}.")

    def _after_error(self, error: Exception) -> None:
        """Raises what ends the run, if that does."""
        failure = failed_start(error)
        if failure is not None:
            # Ray Train leaves its places behind where it ends so, and nobody else would find room.
            give_back(reserved() - self._reserved)
            self._count(failure, "")
        if self._gave_up is not None:
            raise self._gave_up from error
        if failure is None and not starts_again(error):
            raise as_draf_error(error, self.url) from error

    def _ranks(self) -> list[Arrival]:
        """Of the workers that run now: a start within Ray Train takes the place of the one before."""
        arrivals = self.desk.arrivals()[self._began :]
        return [arrival for arrival in arrivals if arrival.group == arrivals[-1].group]

    def _newest(self) -> int:
        """Step of the newest checkpoint, 0 without one; what was known where the store does not answer now."""
        try:
            steps = open_run(self.url).checkpoints.steps()
        except UnreachableError:
            return max(self._failures.newest, 0)
        return steps[-1] if steps else 0

    def _tell_why(self, workers: int) -> None:
        if self._reason is not None:
            self._print(_TOLD[self._reason].format(f"{workers} of {self.profile.workers} workers", self._newest()))
        self._reason = None

    def _relay(self) -> None:
        lines = self.desk.lines_after(self._shown)
        self._shown += len(lines)
        for line in lines:
            self._print(line)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _never_began(self, asked: str) -> InterruptedRunError:
        remedy = "The same command continues."
        return InterruptedRunError(explain(self.url, expected="workers to start", found=f"{asked} before any did", remedy=remedy))


@dataclass
class _Ended:
    """How Ray Train ended."""

    value: object = None
    error: Exception | None = None

    def after(self, fit: Callable[[int], object], workers: int) -> None:
        """Calls it and remembers."""
        try:
            self.value = fit(workers)
        except (TrainingFailedError, RayError) as error:
            self.error = error


@dataclass
class _Watch:
    """What is seen of the cluster while workers run. asked: why they were asked to stop."""

    more: Places
    asked: str | None = None
    interrupted: bool = False
    _steady: Steady = field(default_factory=Steady)
    _began: float = field(default_factory=time.monotonic)
    _looked: float = 0.0

    def is_due(self) -> bool:
        """Whether it is time for the next look."""
        return time.monotonic() - self._looked >= LOOK_INTERVAL_S

    def look(self, ranks_on: frozenset[str]) -> Look:
        """One look at the cluster."""
        self._looked = now = time.monotonic()
        more = self.more.ready()
        return Look(ranks_on, leaving(), more, self._steady.seen(more, now), now - self._began)
