"""`draf train` on a real Ray cluster and a real S3 server, while things happen to it; and what has to come of it all the same.

A run is watched from outside: by the flight recorders of its ranks (files on this machine, with every rank's process and step)
and by the requests that reach the S3 server. Nothing in it knows that it is watched.
"""

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
from fault_server import FaultServer
from small_runs import small_job, small_release

from draf_dist.config.spec import dump_yaml
from draf_dist.errors import DataError
from draf_dist.launch.local_ray import LocalRay
from draf_dist.launch.local_s3 import LocalS3
from draf_dist.launch.ray_cluster import TOKEN, environment
from draf_dist.storage import open_store
from draf_dist.training.job import FinetuneJob
from draf_dist.training.journal import Line
from draf_dist.training.ledger import receipts_by_epoch
from draf_dist.training.run_folder import open_run
from draf_dist.training.schedule import SaveGrid
from draf_dist.training.summary import summarise
from draf_dist.training.watch.flight import RING, ring_folder
from draf_dist.training.watch.ring import read_ring

EVERY_STEPS = 6
CACHE = "cache"
WORKERS = 2
POLL_S = 0.02
PATIENCE_S = 300.0
# How Ray calls the processes of ranks.
RANK_PROCESS = b"RayTrainWorker"
CONTROLLER = b"ray::TrainController"
T = TypeVar("T")


@dataclass
class Place:
    """What runs share. job: what all of them do; epoch_steps: optimizer steps of one of its epochs."""

    folder: Path
    server: LocalS3
    faults: FaultServer
    ray: LocalRay
    bucket: str
    job: FinetuneJob
    epoch_steps: int = 0

    @property
    def num_steps(self) -> int:
        """Of a whole run."""
        return self.epoch_steps * self.job.epochs

    def command(self, url: str) -> list[str]:
        """`draf train` as a user would type it."""
        train = {"kind": "ray", "address": self.ray.address, "workers": WORKERS, "max_failures": 20, "collective_timeout_s": 60}
        profile = self.folder / "profile.json"
        profile.write_text(json.dumps(train))
        options = ["train", str(self.folder / "job.yaml"), "--profile", str(profile), "--out", url]
        return [sys.executable, "-m", "draf_dist.cli.app", *options]

    def rank_processes(self) -> list[int]:
        """Those of ranks on this cluster, oldest first."""
        return self.processes_of(RANK_PROCESS)

    def processes_of(self, title: bytes) -> list[int]:
        """Those on this cluster with such a title, oldest first; there may be other clusters on this machine."""
        found: dict[int, float] = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError, psutil.Error):
                pid = int(path.parent.name)
                if title in path.read_bytes() and self.ray.node_of(pid) is not None:
                    found[pid] = psutil.Process(pid).create_time()
        return sorted(found, key=found.__getitem__)


@contextmanager
def a_place(folder: Path, *, raylets: int, epochs: int) -> Iterator[Place]:
    """A server, a cluster whose every node has room for one rank, and a release; the environment is that of whoever uses them."""
    with ExitStack() as stack:
        server = stack.enter_context(LocalS3(folder / "s3"))
        faults = stack.enter_context(FaultServer(server.endpoint))
        own = {"AWS_ENDPOINT_URL": faults.url, "DRAF_CACHE_DIR": str(folder / CACHE)}
        stack.enter_context(environment({**server.environment, **own}))
        # Flight recorders of other programs' runs lie on this machine too, by the URL of the run.
        bucket = server.create_bucket(f"chaos-{secrets.token_hex(4)}")
        release = small_release(folder, num_subjects=90, seed=1, out=f"{bucket}/release")
        job = small_job(release, epochs=epochs, patience=epochs, checkpoint={"every_steps": EVERY_STEPS, "keep": 3})
        dump_yaml(job, folder / "job.yaml")
        ray = stack.enter_context(LocalRay(TOKEN, cpus=1, more_raylets=raylets))
        stack.enter_context(environment(ray.environment))
        yield Place(folder, server, faults, ray, bucket, job)


@dataclass(frozen=True)
class Seen:
    """What the flight recorder of a rank shows. begun, done: its last step, as metrics.jsonl counts; 0 before the first."""

    attempt: int
    rank: int
    pid: int
    begun: int
    done: int


@dataclass(frozen=True)
class Failure:
    """What was done to a run. attempt: the one that it hit, 0 if that had no number yet; reached: steps that it had done by then.

    intervals: of checkpoints, that may be lost. seconds: from then until the next attempt had done a step, None where that was not
    looked at. time: by time.monotonic().
    """

    what: str
    time: float
    attempt: int
    reached: int
    intervals: int = 1
    seconds: float | None = None


@dataclass(frozen=True)
class Result:
    """What a run comes to: the same to the bit, whatever happened on its way. epochs: numbers of every validation."""

    losses: tuple[tuple[int, float], ...]
    epochs: tuple[tuple[tuple[str, float], ...], ...]
    model_sha256: str
    receipts: tuple[tuple[int, int, str], ...]


@dataclass
class DisturbedRun:
    """One run folder, and the command that is at work on it. failures: what was done to it so far.

    _after: the attempt that the last of them ended; _past: processes of ranks that it hit.
    """

    place: Place
    name: str
    driver: "subprocess.Popen[bytes] | None" = None
    failures: list[Failure] = field(default_factory=list)
    _after: int = 0
    _past: set[int] = field(default_factory=set)
    _rings: Path = field(init=False)

    def __post_init__(self) -> None:
        self._rings = ring_folder(open_store(self.url))

    @property
    def url(self) -> str:
        return f"{self.place.bucket}/runs/{self.name}"

    @property
    def log(self) -> Path:
        """What all commands on this run have said."""
        return self.place.folder / f"{self.name}.log"

    def start(self) -> "subprocess.Popen[bytes]":
        """The same command every time; the one before goes on if it has not ended."""
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                self.place.command(self.url),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.driver

    def end(self) -> int:
        """Waits for the command; its exit code."""
        assert self.driver is not None
        return self.driver.wait(PATIENCE_S)

    def finish(self) -> None:
        """Waits for the command, which has to carry the run to its end."""
        code = self.end()
        assert code == 0, f"exit code {code}: {self.said(500)}"

    def until(self, find: Callable[[], T | None]) -> T:
        """Waits until it finds something; fails where the command ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := find()):
            assert self.driver is not None
            code = self.driver.poll()
            assert code is None, f"the command ended with {code} before: {self.said(300)}"
            assert time.monotonic() < deadline, f"nothing within {PATIENCE_S:.0f} s: {self.said(300)}"
            time.sleep(POLL_S)
        return found

    def said(self, num_chars: int | None = None) -> str:
        """The end of the log."""
        text = self.log.read_text(errors="replace")
        return text if num_chars is None else text[-num_chars:]

    def seen(self) -> list[Seen]:
        """Every rank that trains, or was killed while it did; the newest attempt last."""
        found = []
        for path in sorted(self._rings.glob(f"*{RING}")):
            with suppress(DataError, FileNotFoundError):
                found.append(_seen(path))
        return found

    def newest(self, rank: int = 0) -> Seen | None:
        """That rank in an attempt that nothing has happened to yet."""
        return next((seen for seen in reversed(self.seen()) if seen.rank == rank and seen.attempt > self._after), None)

    def rank_processes(self) -> list[int]:
        """Processes of ranks that were started since the last failure, also those that don't train yet."""
        return [pid for pid in self.place.rank_processes() if pid not in self._past]

    def failed(self, what: str, **facts: Any) -> None:
        """Enters what has just ended an attempt; facts: of the failure, where they are known better."""
        self._past |= set(self.place.rank_processes())
        self.disturbed(what, **facts)
        self._after = max(self._after, self.failures[-1].attempt)

    def disturbed(self, what: str, **facts: Any) -> None:
        """Enters what has just been done, and ends no attempt."""
        seen = [each for each in self.seen() if each.attempt > self._after]
        attempt = max((each.attempt for each in seen), default=self._after)
        reached = max((each.done for each in seen if each.attempt == attempt), default=0)
        self.failures.append(Failure(**{"what": what, "time": time.monotonic(), "attempt": attempt, "reached": reached, **facts}))

    def kill(self, pid: int, what: str) -> None:
        """SIGKILL to one rank."""
        os.kill(pid, signal.SIGKILL)
        self.failed(what)

    def wait_for_new_step(self) -> None:
        """Until the next attempt has done a step, and enters how long that took; or, where there is none left, until the end."""
        assert self.driver is not None
        while not (seen := self.newest()) or not seen.done:
            if self.driver.poll() is not None:
                return
            time.sleep(POLL_S)
        last = self.failures[-1]
        self.failures[-1] = replace(last, seconds=time.monotonic() - last.time)

    def trains(self, step: int) -> Seen | None:
        """The first rank of the newest attempt, once it has done this step."""
        seen = self.newest()
        return seen if seen is not None and seen.done >= step else None

    def ledger(self, event: str) -> list[Line]:
        return [line for line in open_run(self.url).ledger() if line["event"] == event]

    def lost_steps(self, failure: Failure) -> int:
        """Steps that were done and had to be done again."""
        starts = [line["start"] for line in self.ledger("attempt") if line["attempt"] > failure.attempt]
        return max(failure.reached - starts[0], 0) if starts and failure.reached else 0

    def result(self) -> Result:
        """What the run has come to."""
        folder = open_run(self.url)
        metrics = folder.metrics()
        receipts = receipts_by_epoch(folder.ledger())
        return Result(
            losses=tuple((line["step"], line["loss"]) for line in metrics if line["event"] == "step"),
            epochs=tuple(tuple(sorted(line.items())) for line in metrics if line["event"] == "epoch"),
            model_sha256=hashlib.sha256(folder.store.read("model/model.safetensors")).hexdigest(),
            receipts=tuple((epoch, receipt.count, receipt.uid_sum) for epoch, receipt in sorted(receipts.items())),
        )

    def wrong(self, undisturbed: Result) -> list[str]:
        """Everything that is not as it must be, in words; nothing where all is well."""
        found, summary, job = self.result(), summarise(self.url), self.place.job
        parts = [part for part in vars(undisturbed) if getattr(found, part) != getattr(undisturbed, part)]
        steps = [step for step, _ in found.losses]
        checks = {
            "a step stands twice, or not at all": steps == list(range(1, len(steps) + 1)),
            f"draf run show: {summary.state}": summary.state == "finished",
            f"draf run show: {summary.epochs_complete} epochs complete": summary.epochs_complete == job.epochs,
            "draf run show: not as planned": summary.as_planned is True,
        }
        lost = [self.lost_too_much(failure) for failure in self.failures]
        return [*(f"another {part}" for part in parts), *(what for what, holds in checks.items() if not holds), *filter(None, lost)]

    def lost_too_much(self, failure: Failure) -> str | None:
        """One interval may be lost; and where a checkpoint was on its way, what was trained meanwhile."""
        lost, save = self.lost_steps(failure), self._last_save(failure.reached)
        at_most = failure.intervals * EVERY_STEPS + failure.reached - save
        return f"{failure.what}: {lost} steps lost, at most {at_most}" if lost > at_most else None

    def _last_save(self, step: int) -> int:
        """The last step up to this one after which a checkpoint begins."""
        return SaveGrid(EVERY_STEPS, self.place.epoch_steps).last(step)


def undisturbed(place: Place) -> Result:
    """What every run has to come to; `place` then knows how long an epoch is."""
    run = DisturbedRun(place, "undisturbed")
    run.start()
    run.finish()
    found = run.result()
    place.epoch_steps = len(found.losses) // place.job.epochs
    wrong = run.wrong(found)
    assert not wrong, wrong
    return found


@contextmanager
def held(run: DisturbedRun, method: str, key: str) -> Iterator[Callable[[], bool]]:
    """The next request of that kind gets no answer for some seconds; gives what tells whether it has come."""
    faults = run.place.faults
    before = faults.num_requests(key=key, method=method)
    faults.stall(8, key=key, method=method)
    try:
        yield lambda: faults.num_requests(key=key, method=method) > before
    finally:
        faults.clear()


def _seen(path: Path) -> Seen:
    ring = read_ring(path)
    number = max(ring.records, default=0)
    done = number
    if number:
        length = int.from_bytes(ring.records[number][:4], "little")
        # What is known at its beginning has no loss.
        done -= "loss" not in json.loads(ring.records[number][4 : 4 + length])
    return Seen(ring.about["attempt"], ring.about["rank"], ring.about["pid"], number, done)
