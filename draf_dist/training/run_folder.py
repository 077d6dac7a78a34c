"""A run folder, local or remote: what is in it, and which attempt may write."""

import io
import secrets
import time
from dataclasses import dataclass
from typing import Literal

from ruamel.yaml import YAML

from draf_dist.data.release import split_version
from draf_dist.errors import SpecError, explain
from draf_dist.protocols.attempts import AttemptRecord, begin_anew, check_newest, take
from draf_dist.protocols.names import ATTEMPTS, CHECKPOINTS, MANIFEST
from draf_dist.protocols.operations import run_on
from draf_dist.storage import Store, open_store
from draf_dist.training.checkpoint import Checkpoints
from draf_dist.training.jobs import AnyJob, parse_job, resolved
from draf_dist.training.journal import Line, read_lines
from draf_dist.training.ledger import FILE as LEDGER
from draf_dist.training.supply import LEFT_OUT
from draf_dist.training.tracking import METRICS, TENSORBOARD
from draf_dist.training.watch.flight import FLIGHT
from draf_dist.training.watch.last_step import PROGRESS

JOB = "job.yaml"
MODEL = "model"
# What runs had instead of attempts/ before attempts were numbered.
TOKEN = "attempt"
# Everything that a run, its evaluations and the gate write; --fresh removes this, but for the attempts, and nothing else.
EVALUATED = (
    *("predictions", "evaluation.json", "report.html", "evaluations", "evaluating", "verdict.json", "gate.html"),
    *("masks.json", "masks.png"),
)
CONTENT = (CHECKPOINTS, MODEL, TENSORBOARD, JOB, METRICS, LEDGER, PROGRESS, ATTEMPTS, TOKEN, LEFT_OUT, FLIGHT, *EVALUATED)
Start = Literal["continue", "fresh", "resume"]


@dataclass(frozen=True)
class RunFolder:
    """A run that exists: its job, with the release pinned, and its books."""

    store: Store
    job: AnyJob

    @property
    def url(self) -> str:
        """Where it is."""
        return self.store.url

    @property
    def checkpoints(self) -> Checkpoints:
        """Its checkpoints."""
        return Checkpoints(self.store, self.job.checkpoint.keep, self.job.checkpoint.keep_best)

    def ledger(self) -> list[Line]:
        """The lines of ledger.jsonl."""
        return read_lines(self.store, LEDGER)

    def metrics(self) -> list[Line]:
        """The lines of metrics.jsonl."""
        return read_lines(self.store, METRICS)

    def end(self) -> Line | None:
        """The line that says that the run is finished and with what result, None before that."""
        ended = [line for line in self.ledger() if line["event"] == "end" and line["outcome"] == "finished"]
        return ended[-1] if ended else None


@dataclass(frozen=True)
class Fence:
    """Holds a folder for one attempt: it has the highest number in attempts/, and whoever finds a higher one than its own stops."""

    store: Store
    attempt: AttemptRecord

    @classmethod
    def take(cls, store: Store) -> "Fence":
        """Makes this the attempt that may write: any older one stops at its next checkpoint, and what it still saves isn't seen."""
        return cls(store, run_on(store, take(secrets.token_hex(16), time.time())))

    def check(self) -> None:
        """Asks whether this is still the newest attempt.

        Raises:
            GateError: a later one has taken the folder over.
        """
        run_on(self.store, check_newest(self.attempt))


def open_run(url: str) -> RunFolder:
    """The run at a URL.

    Raises:
        SpecError: there is none.
    """
    store = open_store(url, must_exist=True)
    if not store.exists(JOB):
        raise SpecError(explain(store.url, expected="a run folder", found=f"no {JOB}", remedy="Start one with draf train JOB."))
    return RunFolder(store, parse_job(store.read(JOB).decode(), where=store.where(JOB)))


def as_pinned_there(job: AnyJob, url: str) -> AnyJob:
    """The job with the version that the run at a URL has pinned, where the job names none.

    So the same command continues a run, or prints its result, although a delivery has come since.
    """
    if not open_store(url).exists(JOB):
        return job
    there = open_run(url).job.release
    same = open_store(job.release).url == open_store(split_version(there)[0]).url
    return job.model_copy(update={"release": there}) if same else job


def enter_run(url: str, job: AnyJob, start: Start) -> RunFolder:
    """The folder of a job whose release is pinned, made or found.

    Raises:
        SpecError: `resume` and there is no run; the folder holds another job's run, or something that is no run.
    """
    store = open_store(url)
    if start == "fresh":
        clear(store)
    if store.exists(JOB):
        found = open_run(url)
        if found.job.sha256 == job.sha256:
            return found
        if store.list() != [JOB]:
            raise _another_job(store, found.job, job)
        # Nothing has begun: that job was refused, and this is the corrected one.
        store.delete(JOB)
    if start == "resume":
        raise SpecError(explain(store.url, expected="a run to resume", found="none", remedy="Leave --resume out to start one."))
    paths = store.list()
    _check_only_a_run(store, paths)
    if paths and start != "fresh":
        left = f"what is left of a run, without {JOB}"
        raise SpecError(explain(store.url, expected="a run, or an empty folder", found=left, remedy="--fresh removes it."))
    _write_job(store, job)
    return RunFolder(store, job)


def clear(store: Store) -> None:
    """Removes a run; manifests and the job go first, so that nothing half removed looks whole.

    The attempts stay: whoever of that run still lives finds a later number than its own, and none is ever used again.

    Raises:
        SpecError: the folder holds something that is not a run.
    """
    paths = store.list()
    _check_only_a_run(store, paths)
    if paths:
        run_on(store, begin_anew(secrets.token_hex(16), time.time()))
    # Of what was there before that: a later attempt loses nothing.
    removed = [path for path in paths if not path.startswith(f"{ATTEMPTS}/")]
    for path in sorted(removed, key=lambda path: not path.endswith((MANIFEST, JOB))):
        store.delete(path)


def _check_only_a_run(store: Store, paths: list[str]) -> None:
    strange = sorted({path.split("/")[0] for path in paths if path.split("/")[0] not in CONTENT})
    if strange:
        found = f"{', '.join(strange[:5])} as well"
        raise SpecError(explain(store.url, expected="a run folder and nothing else", found=found, remedy="Choose another --out."))
    if paths and JOB not in paths and not any(map(_is_mark, paths)):
        # A folder named model or predictions alone may be anybody's.
        found = f"neither {JOB} nor {ATTEMPTS}"
        raise SpecError(explain(store.url, expected="a run folder", found=found, remedy="Choose another --out."))


def _is_mark(path: str) -> bool:
    """Whether only a run has this."""
    return path == TOKEN or path.startswith(f"{ATTEMPTS}/")


def _write_job(store: Store, job: AnyJob) -> None:
    text = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(resolved(job), text)
    store.write(JOB, text.getvalue().encode())


def _another_job(store: Store, there: AnyJob, here: AnyJob) -> SpecError:
    before, after = there.model_dump(mode="json"), here.model_dump(mode="json")
    differing = ", ".join(key for key in {**before, **after} if before.get(key) != after.get(key))
    remedy = "Choose another --out, or --fresh to replace it."
    return SpecError(explain(store.url, expected="a run of this job", found=f"one with another {differing}", remedy=remedy))
