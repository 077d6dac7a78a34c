"""What the wall time of a run went into, from its ledger alone: every second from when it was first begun, in exactly one place.

Within an attempt the lines of the ledger say how long what took, by a clock that only goes forward. Between attempts there are the
clocks of the nodes. An attempt has read the books of the one before when it enters its first line: where its clock says that this
was earlier than what it read, its clock is behind, and is put forward by the difference. What two attempts did at the same time is
counted once, for the earlier one. So no part is negative and all of them add up to the wall time. A clock that is ahead can't be
told from a longer gap.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from draf_dist.training.journal import Line

# In the order in which they are shown.
KINDS = ("step", "data_wait", "validate", "checkpoint", "startup", "restart", "lost", "idle", "other")
# What an attempt books before its first step: the first one of a run starts, every later one restarts.
STARTING = ("startup", "restart")
# Ends of an attempt that nobody asked for; one without any end is of the same kind.
BROKEN = ("failed", "rolled_back")
# After these the workers are started again by whoever stopped them, so nobody is idle.
STARTED_AGAIN = ("preemption", "resize")
UNKNOWN = "no word of its end"


@dataclass(frozen=True)
class Failure:
    """An attempt that broke. why: as it said itself; lost_steps: done and thrown away, as far as known; lost_s: what they took.

    restart_s: from the last sign of it to the first step of the next attempt, as far as there is one. foreseen: it went back after
    a bad loss, or ended by an error that is told to the user (DataError, StorageFullError, ...): no accident, so nothing to be
    expected again after some time.
    """

    attempt: int
    why: str
    lost_steps: int
    lost_s: float
    restart_s: float
    foreseen: bool = False


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went, from its first beginning to the last line of its ledger.

    seconds, by kind, adding up to wall_s:
      step        of steps that count, i.e. were not thrown away (what a skipped one took until it was skipped included)
      data_wait   waiting for their batches
      validate, checkpoint   what training waited for; checkpoint includes the export at the end
      startup     of the first attempt, until it had its first batch
      restart     from the last sign of an attempt that broke, or was stopped to be started again, until the next had its first
                  batch; after an idle time from when the next began
      lost        all that was done and thrown away, because a later attempt began before it
      idle        nobody was trying: from an end that was asked for to the next command
      other       the rest
    ettr: seconds of steps that count / wall time: the goodput, or effective training time ratio. (Kokolis et al. 2024, arXiv
    2410.21680, count as productive all that was neither restart nor lost, waiting for data too: this is the stricter one.)
    samples_per_s: consumed for good, per second of wall time. failures, lost_steps: see Failure; a planned stop
    loses steps too if its checkpoint was broken. stops: ends that were asked for, by reason. mtbf_s: mean time between failures
    that were not foreseen, leaving out when nobody was trying (idle, or from a foreseen one to the next attempt); None without any.
    """

    wall_s: float
    seconds: dict[str, float]
    ettr: float
    samples_per_s: float
    steps: int
    attempts: int
    failures: tuple[Failure, ...]
    lost_steps: int
    stops: dict[str, int]
    mtbf_s: float | None

    @property
    def accidents(self) -> tuple[Failure, ...]:
        """The failures that were not foreseen."""
        return _accidents(self.failures)


def goodput(lines: Iterable[Line]) -> Goodput:
    """Splits the wall time that the lines of a ledger tell of. What belongs to an attempt that was overtaken before is left out."""
    account = _Account()
    for line in lines:
        if line["event"] == "attempt":
            account.begin(line)
        elif line.get("attempt") == account.attempt:
            account.add(line)
    return account.settled()


@dataclass(frozen=True)
class _Commit:
    """A commit that counts until a later attempt begins before its end."""

    stop: int
    samples: int
    seconds: dict[str, float]


@dataclass
class _Account:
    """Goes through the lines. cursor: up to where the wall time is split, on the clock of the first node."""

    attempt: int = 0
    attempts: int = 0
    cursor: float = 0.0
    sign: float = 0.0
    shift: float = 0.0
    overlap: float = 0.0
    done: int = 0
    booked: bool = False
    ended: Line | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    commits: list[_Commit] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    stops: dict[str, int] = field(default_factory=dict)
    lost_steps: int = 0
    # Of the attempt in hand: what it lost already by its own account, and whether it follows a failure.
    lost_s: float = 0.0
    hung_s: float = 0.0
    after_failure: bool = False

    def begin(self, line: Line) -> None:
        """An attempt begins, and with it all that the one before it did is known."""
        began: float = line["began"] if "began" in line else line["time"]
        if self.attempts == 0:
            self.cursor = began
        else:
            self._close(line.get("before"), line["start"], line["time"])
            self._gap(began + self.shift)
        self.attempts += 1
        self.attempt, self.ended, self.booked, self.lost_s = line["attempt"], None, False, 0.0
        self.hung_s = 0.0
        self.done, self.sign = line["start"], line["time"] + self.shift

    def add(self, line: Line) -> None:
        """Something that the attempt in hand entered."""
        self.sign = max(self.sign, line["time"] + self.shift)
        if line["event"] == "commit":
            seconds = self._booked(line["seconds"])
            samples = sum(receipt["count"] for receipt in line["receipts"].values())
            self.commits.append(_Commit(line["stop"], samples, seconds))
            self.done = line["stop"]
        elif line["event"] == "end":
            self._end(line)

    def settled(self) -> Goodput:
        """All that is known by the last line."""
        if self.ended is None:
            self._reach(self.sign)
        elif self.ended["outcome"] in BROKEN:
            self._lose(self.ended["steps"])
        seconds = {kind: max(round(value, 6), 0.0) for kind, value in self.seconds.items()}
        wall_s = sum(seconds.values())
        samples = sum(commit.samples for commit in self.commits)
        return Goodput(
            wall_s=wall_s,
            seconds=seconds,
            ettr=seconds["step"] / wall_s if wall_s else 0.0,
            samples_per_s=samples / wall_s if wall_s else 0.0,
            steps=self.commits[-1].stop if self.commits else 0,
            attempts=self.attempts,
            failures=tuple(_rounded(failure) for failure in self.failures),
            lost_steps=self.lost_steps,
            stops=dict(self.stops),
            mtbf_s=self._between_accidents(wall_s - seconds["idle"]),
        )

    def _between_accidents(self, tried_s: float) -> float | None:
        accidents = len(_accidents(self.failures))
        tried_s -= sum(failure.restart_s for failure in self.failures if failure.foreseen)
        return round(tried_s / accidents, 6) if accidents else None

    def _end(self, line: Line) -> None:
        self.ended = line
        self.done = line["done"] if "done" in line else line["steps"]
        found = self._booked(line["seconds"])
        if line["outcome"] in BROKEN:
            # What nobody booked was spent in the step that did not end.
            self.hung_s = found.get("other", 0.0)
            self._move(found, {kind: "restart" if kind == "other" else "lost" for kind in found if kind not in STARTING})
            self.lost_s = sum(seconds for kind, seconds in found.items() if kind not in (*STARTING, "other"))
        elif line["outcome"] == "interrupted":
            reason = line.get("reason") or "asked to stop"
            self.stops[reason] = self.stops.get(reason, 0) + 1

    def _close(self, before: Line | None, start: int, time: float) -> None:
        """What became of the attempt in hand, when the next one begins at step `start` and enters that at `time` of its clock."""
        if self.ended is None:
            if before is not None:
                self.sign, self.done = max(self.sign, before["time"] + self.shift), max(before["done"], self.done)
            self.lost_s = self._reach(self.sign, 0.0 if before is None else before["lost_s"])
        # The next one has read all of this: so its clock is behind if it says that this comes first.
        self.shift = max(self.sign - time, 0.0)
        self._lose(start)

    def _lose(self, start: int) -> None:
        """The run goes on from `start`."""
        gone = [commit for commit in self.commits if commit.stop > start]
        self.commits = [commit for commit in self.commits if commit.stop <= start]
        for commit in gone:
            self._move(commit.seconds, {kind: "lost" for kind in commit.seconds if kind not in STARTING})
            self.lost_s += sum(seconds for kind, seconds in commit.seconds.items() if kind not in STARTING)
        lost_steps = max(self.done - start, 0)
        self.lost_steps += lost_steps
        self.after_failure = self.ended is None or self.ended["outcome"] in BROKEN
        if self.after_failure:
            why = UNKNOWN if self.ended is None else self.ended.get("reason") or self.ended["outcome"]
            self.failures.append(Failure(self.attempt, why, lost_steps, self.lost_s, self.hung_s, foreseen=self._foreseen))

    def _gap(self, began: float) -> None:
        """From the last that is known of an attempt to the beginning of the next."""
        gap = began - self.cursor
        again = self.after_failure or (self.ended is not None and self.ended.get("reason") in STARTED_AGAIN)
        self._spend("restart" if again else "idle", max(gap, 0.0))
        self.overlap = max(-gap, 0.0)

    def _booked(self, seconds: dict[str, float]) -> dict[str, float]:
        """Splits the time of a line, less what the attempt before was still doing meanwhile; what it was split into."""
        found: dict[str, float] = {}
        for kind, value in seconds.items():
            known = self._starting if kind in STARTING else kind if kind in KINDS and kind != "idle" else "other"
            found[known] = found.get(known, 0.0) + max(value, 0.0)
        # It was starting then: it had not yet taken the run over.
        for kind in sorted(found, key=lambda kind: kind not in STARTING):
            cut = min(self.overlap, found[kind])
            found[kind] -= cut
            self.overlap -= cut
        for kind, value in found.items():
            self._spend(kind, value)
        self.booked = True
        return found

    def _reach(self, until: float, lost_s: float = 0.0) -> float:
        """Splits the time up to a sign of life; of it, at most lost_s were steps of which nothing is left. Returns how much."""
        tail = max(until - self.cursor, 0.0)
        lost = min(lost_s, tail)
        self._spend("lost", lost)
        self._spend("other" if self.booked else self._starting, tail - lost)
        return lost

    @property
    def _foreseen(self) -> bool:
        return self.ended is not None and bool(self.ended.get("foreseen", self.ended["outcome"] == "rolled_back"))

    @property
    def _starting(self) -> str:
        return "startup" if self.attempts <= 1 else "restart"

    def _spend(self, kind: str, seconds: float) -> None:
        self.seconds[kind] += seconds
        self.cursor += seconds
        if kind == "restart" and self.after_failure and self.failures:
            latest = self.failures[-1]
            self.failures[-1] = replace(latest, restart_s=latest.restart_s + seconds)

    def _move(self, found: dict[str, float], to: dict[str, str]) -> None:
        for kind, other in to.items():
            self.seconds[kind] -= found[kind]
            self.seconds[other] += found[kind]


def _accidents(failures: Iterable[Failure]) -> tuple[Failure, ...]:
    return tuple(failure for failure in failures if not failure.foreseen)


def _rounded(failure: Failure) -> Failure:
    return replace(failure, lost_s=round(failure.lost_s, 6), restart_s=round(failure.restart_s, 6))
