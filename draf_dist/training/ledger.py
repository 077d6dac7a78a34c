"""ledger.jsonl: attempts, what each of them consumed, and where wall time went.

Lines, by `event`:
  attempt   attempt, start (steps done when it began), world, threads, decode_threads, began (when it began to work, seconds since
            1970), time (when it could write this); before {done (steps), time, lost_s (what those past its last commit took)}, the
            last sign of an attempt before it that did not say how it ended
  commit    attempt, start, stop (steps [start, stop)), world, receipts {source epoch: {count, uid_sum}}, left_out {source epoch:
            samples that the order gave and that were left out}, data {cache_hits, ...: see loader_stats}, validation (the same of
            validation), seconds {kind: s}, time
            (a source epoch is "3", or "new:3" and "old:3" of a run with replay: every source counts its own)
  skipped   attempt, start, stop (the updates of steps [start, stop) are skipped), why, time; holds for every later attempt
  slow      attempt, step, rank, own_s and others_s (a step), of (what: data, or its forward), time
  save      attempt, step, size_bytes, snapshot_s, books_s, upload_s, commit_s of a checkpoint that has become durable: see
            saving.SaveReport
  end       attempt, outcome (finished | interrupted | failed | rolled_back), reason (who asked for it, or what went wrong),
            foreseen (of an error: whether it is one that draf knows and explains, i.e. no accident), steps, done (steps, with
            those that no commit holds), best_loss (of validation), best_step, seconds, goodput (up to here: see goodput.py), time
A commit is written just before its checkpoint, so a kill between the two leaves a commit that no checkpoint backs. The attempt
that follows says where it really began, and whatever was consumed past that point is consumed again: such commits do not count.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from draf_dist.data.loader_stats import LoaderStats
from draf_dist.data.receipts import add_receipts
from draf_dist.schema.release import Receipt
from draf_dist.training.goodput import Goodput, goodput
from draf_dist.training.journal import Journal, Line
from draf_dist.training.saving import SaveReport
from draf_dist.training.watch.last_step import LastStep

FILE = "ledger.jsonl"
Kind = Literal["startup", "restart", "data_wait", "step", "validate", "checkpoint", "other"]
Noted = Literal["skipped", "slow"]
Outcome = Literal["finished", "interrupted", "failed", "rolled_back"]
NOTHING = Receipt(count=0, uid_sum="0" * 16)
# The name of a source, and its epoch.
SourceEpoch = tuple[str, int]
# The name of the source of a run that has one only.
ONLY = ""


@dataclass(frozen=True)
class Consumed:
    """What all ranks consumed between two commits, by source epoch: what was used, and how many samples were left out."""

    receipts: Mapping[SourceEpoch, Receipt]
    left_out: Mapping[SourceEpoch, int]


@dataclass(frozen=True)
class Supplied:
    """What the loaders of all ranks did between two commits, for training and for validation."""

    training: LoaderStats
    validation: LoaderStats


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
            of = _source_epoch(key)
            totals[of] = add_receipts(totals.get(of, NOTHING), Receipt.model_validate(stored))
    return totals


def left_out_by_source(lines: Iterable[Line]) -> dict[SourceEpoch, int]:
    """How many samples of every epoch of every source the order gave and the run left out, over all attempts."""
    totals: dict[SourceEpoch, int] = {}
    for commit in effective_commits(lines):
        for key, count in commit.get("left_out", {}).items():
            of = _source_epoch(key)
            totals[of] = totals.get(of, 0) + count
    return totals


def receipts_by_epoch(lines: Iterable[Line], source: str = ONLY) -> dict[int, Receipt]:
    """The same of one source, by its epoch."""
    return {epoch: total for (name, epoch), total in receipts_by_source(lines).items() if name == source}


def source_epoch_name(source: str, epoch: int) -> str:
    """How a source epoch is written."""
    return str(epoch) if source == ONLY else f"{source}:{epoch}"


def _source_epoch(name: str) -> SourceEpoch:
    source, _, epoch = name.rpartition(":")
    return source, int(epoch)


def supply_of(lines: Iterable[Line]) -> Supplied:
    """What the loaders of all ranks did in all attempts, as far as it was committed, and what was read twice with it."""
    commits = [line for line in lines if line["event"] == "commit"]
    return Supplied(*(_total(line.get(part, {}) for line in commits) for part in ("data", "validation")))


def _total(parts: Iterable[dict[str, int]]) -> LoaderStats:
    return sum((LoaderStats(**part) for part in parts), LoaderStats())


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
    decode_threads: int
    began: float = field(default_factory=time.perf_counter)
    _seconds: dict[str, float] = field(default_factory=dict)
    _position: int = 0
    _done: int = 0

    def __post_init__(self) -> None:
        lines = self.journal.lines
        self._again = any(line["event"] == "attempt" for line in lines)
        self._noted = [line for line in lines if line["event"] in get_args(Noted)]

    def open(self, before: LastStep | None) -> None:
        """Writes that the attempt began. before: the last sign of the one before, if that did not say how it ended."""
        self._since = self.began
        self._position = self._done = self.start
        began = round(time.time() - (time.perf_counter() - self.began), 3)
        threads = {"threads": self.threads, "decode_threads": self.decode_threads}
        known = {} if before is None else {"before": {"done": before.step, "time": before.time, "lost_s": before.lost_s}}
        self._write("attempt", start=self.start, world=self.world, **threads, began=began, **known)

    @property
    def starting(self) -> Kind:
        """What the time before the first step is booked as."""
        return "restart" if self._again else "startup"

    @property
    def at_stake_s(self) -> float:
        """What has been booked since the last commit, but for the start: what a kill would throw away."""
        return sum(seconds for kind, seconds in self._seconds.items() if kind not in ("startup", "restart"))

    def step(self, done: int, wait_s: float, compute_s: float) -> None:
        """Books one step, with which `done` are. The first batch of an attempt is part of its start."""
        self.spend(self.starting if self._done == self.start else "data_wait", wait_s)
        self.spend("step", compute_s)
        self._done = done

    def spend(self, kind: Kind, seconds: float) -> None:
        """Books wall time."""
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def commit(self, stop: int, consumed: Consumed, supplied: Supplied) -> None:
        """Enters what was consumed since the last commit, [position, stop), and what the loaders did for it; then flush."""
        receipts = {source_epoch_name(*of): part.model_dump() for of, part in sorted(consumed.receipts.items())}
        left_out = {source_epoch_name(*of): count for of, count in sorted(consumed.left_out.items())}
        read = {"data": asdict(supplied.training), "validation": asdict(supplied.validation)}
        facts = {"receipts": receipts, "left_out": left_out, **read, "seconds": self._settle()}
        self.journal.append(self._line("commit", start=self._position, stop=stop, world=self.world, **facts))
        self._position = stop

    def note(self, event: Noted, **facts: object) -> None:
        """Writes what happened, unless it is known: an attempt that does steps again meets the same."""
        known = {"event": event, **facts}
        if not any(known.items() <= line.items() for line in self._noted):
            self._noted.append(known)
            self._write(event, **facts)

    def saved(self, report: SaveReport) -> None:
        """Enters a checkpoint that has become durable; the line is, with the next commit."""
        facts = {name: round(value, 6) for name, value in asdict(report).items()}
        self.journal.append(self._line("save", **facts))

    def close(self, outcome: Outcome, reason: str | None, **more: float | None) -> Goodput:
        """Writes how the attempt ended, and what the wall time of the run went into until then."""
        facts = {"outcome": outcome, "reason": reason, "steps": self._position, "done": self._done, **more}
        line = self._line("end", **facts, seconds=self._settle())
        found = goodput([*self.journal.lines, line])
        self.journal.append({**line, "goodput": asdict(found)})
        self.journal.flush()
        return found

    def flush(self) -> None:
        """Makes every line so far durable; any thread may call it."""
        self.journal.flush()

    def _settle(self) -> dict[str, float]:
        """Seconds by kind since the last call; what nobody booked was something else."""
        now = time.perf_counter()
        self.spend("other", max(now - self._since - sum(self._seconds.values()), 0.0))
        seconds, self._seconds, self._since = self._seconds, {}, now
        return {kind: round(value, 6) for kind, value in seconds.items()}

    def _write(self, event: str, **facts: object) -> None:
        self.journal.append(self._line(event, **facts))
        self.journal.flush()

    def _line(self, event: str, **facts: object) -> Line:
        return {"event": event, "attempt": self.attempt, **facts, "time": round(time.time(), 3)}
