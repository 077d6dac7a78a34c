"""ledger.jsonl: attempts, what each of them consumed, and where wall time went.

Lines, by `event`:
  attempt   attempt, start (steps done when it began), world, threads, time (seconds since 1970)
  commit    attempt, start, stop (steps [start, stop)), world, receipts {source epoch: {count, uid_sum}}, data {cache_hits, ...,
            left_out: see loader_stats}, seconds {kind: s}, time
            (a source epoch is "3", or "new:3" and "old:3" of a run with replay: every source counts its own)
  end       attempt, outcome (finished | interrupted), steps, best_loss (of validation), best_step, seconds, time
A commit is written just before its checkpoint, so a kill between the two leaves a commit that no checkpoint backs. The attempt
that follows says where it really began, and whatever was consumed past that point is consumed again: such commits do not count.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Literal

from draf_dist.data.loader_stats import LoaderStats
from draf_dist.data.receipts import add_receipts
from draf_dist.schema.release import Receipt
from draf_dist.training.journal import Journal, Line

FILE = "ledger.jsonl"
Kind = Literal["startup", "data_wait", "step", "validate", "checkpoint", "idle"]
Outcome = Literal["finished", "interrupted"]
NOTHING = Receipt(count=0, uid_sum="0" * 16)
# The name of a source, and its epoch.
SourceEpoch = tuple[str, int]
# The name of the source of a run that has one only.
ONLY = ""


def effective_commits(lines: Iterable[Line]) -> list[Line]:
    """The commits that a later attempt did not consume again; their steps follow one another without gap or overlap."""
    commits: list[Line] = []
    for line in lines:
        if line["event"] == "attempt":
            commits = [commit for commit in commits if commit["stop"] <= line["start"]]
        elif line["event"] == "commit":
            commits.append(line)
    return commits


def receipts_by_source(lines: Iterable[Line]) -> dict[SourceEpoch, Receipt]:
    """What the run consumed of every epoch of every source, over all attempts; a complete epoch equals the source's receipt."""
    totals: dict[SourceEpoch, Receipt] = {}
    for commit in effective_commits(lines):
        for key, stored in commit["receipts"].items():
            name, _, epoch = key.rpartition(":")
            part = Receipt.model_validate(stored)
            totals[name, int(epoch)] = add_receipts(totals.get((name, int(epoch)), NOTHING), part)
    return totals


def receipts_by_epoch(lines: Iterable[Line], source: str = ONLY) -> dict[int, Receipt]:
    """The same of one source, by its epoch."""
    return {epoch: total for (name, epoch), total in receipts_by_source(lines).items() if name == source}


def source_epoch_name(source: str, epoch: int) -> str:
    """How a source epoch is written."""
    return str(epoch) if source == ONLY else f"{source}:{epoch}"


def supply_of(lines: Iterable[Line]) -> LoaderStats:
    """What the loaders of all ranks did in all attempts, as far as it was committed, and what was read twice with it."""
    commits = (line.get("data", {}) for line in lines if line["event"] == "commit")
    return sum((LoaderStats(**data) for data in commits), LoaderStats())


def seconds_by_kind(lines: Iterable[Line]) -> dict[str, float]:
    """Wall time of all attempts by kind, as far as it was written; work that a kill threw away is not in it."""
    totals: dict[str, float] = {}
    for line in lines:
        for kind, seconds in line.get("seconds", {}).items():
            totals[kind] = totals.get(kind, 0.0) + seconds
    return totals


@dataclass
class Ledger:
    """Keeps the books of one attempt. began: when, by time.perf_counter()."""

    journal: Journal
    attempt: int
    start: int
    world: int
    threads: int
    began: float = field(default_factory=time.perf_counter)
    _seconds: dict[str, float] = field(default_factory=dict)
    _position: int = 0

    def open(self) -> None:
        """Writes that the attempt began."""
        self._since = self.began
        self._position = self.start
        self._write("attempt", start=self.start, world=self.world, threads=self.threads)

    def spend(self, kind: Kind, seconds: float) -> None:
        """Books wall time."""
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def commit(self, stop: int, consumed: dict[SourceEpoch, Receipt], supply: LoaderStats) -> None:
        """Writes what was consumed since the last commit, [position, stop): a receipt by source epoch, over all ranks.

        supply: what the loaders did for it, over all ranks.
        """
        receipts = {source_epoch_name(*of): part.model_dump() for of, part in sorted(consumed.items())}
        facts = {"receipts": receipts, "data": asdict(supply), "seconds": self._settle()}
        self._write("commit", start=self._position, stop=stop, world=self.world, **facts)
        self._position = stop

    def close(self, outcome: Outcome, *, best_loss: float | None, best_step: int | None) -> None:
        """Writes how the attempt ended."""
        self._write("end", outcome=outcome, steps=self._position, best_loss=best_loss, best_step=best_step, seconds=self._settle())

    def _settle(self) -> dict[str, float]:
        """Seconds by kind since the last call; what nobody booked was idle."""
        now = time.perf_counter()
        self.spend("idle", max(now - self._since - sum(self._seconds.values()), 0.0))
        seconds, self._seconds, self._since = self._seconds, {}, now
        return {kind: round(value, 6) for kind, value in seconds.items()}

    def _write(self, event: str, **facts: object) -> None:
        self.journal.append({"event": event, "attempt": self.attempt, **facts, "time": round(time.time(), 3)})
        self.journal.flush()
