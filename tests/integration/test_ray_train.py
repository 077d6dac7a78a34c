"""Two Ray workers with DeepSpeed do what one process does, and go on after any of them is killed, on a real cluster."""

import io
import json
import os
import pickle
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import S3
from ray.exceptions import RayActorError
from ray.train import ControllerError
from rich.console import Console
from small_runs import small_job, small_release

from draf_dist.errors import DataError, DrafError, InterruptedRunError, SpecError, UnreachableError
from draf_dist.launch.profile import RayProfile
from draf_dist.launch.ray_cluster import RayCluster, check_reach, places_on, ray_cluster
from draf_dist.launch.ray_desk import Arrival, Desk, pids_by_start
from draf_dist.launch.ray_failures import as_draf_error, describe, gave_up
from draf_dist.launch.ray_train import train_on_ray
from draf_dist.storage import open_store
from draf_dist.training.job import FinetuneJob
from draf_dist.training.journal import read_lines
from draf_dist.training.ledger import receipts_by_epoch
from draf_dist.training.run import RunResult, train
from draf_dist.training.run_folder import open_run

PROFILE = RayProfile(collective_timeout_s=60)
RECOVERY_S = 30.0
# A step takes about twice as long; the cores belong to the workers.
POLL_S = 0.03

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Said(Console):
    """A console that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=1000)

    @property
    def lines(self) -> list[str]:
        text = self.file.getvalue() if isinstance(self.file, io.StringIO) else ""
        return text.splitlines()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> FinetuneJob:
    release = small_release(tmp_path_factory.mktemp("data"), num_subjects=90, seed=1)
    return small_job(release, epochs=4, checkpoint={"every_steps": 6, "keep": 3})


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(PROFILE) as entered:
        yield entered


def run(job: FinetuneJob, out: Path | str, profile: RayProfile = PROFILE, **options: Any) -> RunResult:
    return train_on_ray(job, str(out), profile, console=options.pop("console", Said()), **options)


@pytest.fixture(scope="module")
def undisturbed(job: FinetuneJob, cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    said = Said()
    assert run(job, out, console=said).finished
    # What the first rank says reaches the user while the run goes on: one line an epoch.
    assert [line.split()[1] for line in said.lines if line.startswith("epoch")] == [f"{n}/4" for n in range(1, 5)]
    return out


def losses(out: Path) -> list[tuple[int, float]]:
    lines = read_lines(open_store(str(out)), "metrics.jsonl")
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]


def ledger(out: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(open_store(str(out)), "ledger.jsonl") if line["event"] == event]


def assert_same_run(left: Path, right: Path, job: FinetuneJob) -> None:
    assert losses(left) == losses(right)
    assert (left / "model" / "model.safetensors").read_bytes() == (right / "model" / "model.safetensors").read_bytes()
    receipts = [receipts_by_epoch(read_lines(open_store(str(out)), "ledger.jsonl")) for out in (left, right)]
    assert receipts[0] == receipts[1]
    assert sorted(receipts[0]) == list(range(job.epochs))


class Watcher:
    """Looks at a run from beside it, and does something to it at chosen steps."""

    def __init__(self, out: Path) -> None:
        self.metrics, self.out = out / "metrics.jsonl", out
        self.recoveries: list[float] = []
        self.desk: Desk | None = None

    def then(self, act: Callable[[], None]) -> Callable[[Desk], None]:
        """For train_on_ray's `watch`: acts in a thread of its own."""

        def start(desk: Desk) -> None:
            self.desk = desk
            threading.Thread(target=act, daemon=True).start()

        return start

    def wait_past(self, step: int) -> None:
        """Until a step after `step` is recorded."""
        deadline = time.monotonic() + 300
        while self.last_step() <= step:
            assert time.monotonic() < deadline
            time.sleep(POLL_S)

    def last_step(self) -> int:
        if not self.metrics.exists():
            return 0
        lines = [line for line in self.metrics.read_text().splitlines() if line.endswith("}")]
        return max((json.loads(line)["step"] for line in lines), default=0)

    def kill_after(self, step: int, rank: int) -> None:
        """SIGKILL, then the time until the next attempt has recorded a step of its own."""
        self.wait_past(step)
        assert self.desk is not None
        before, attempts = self.metrics.stat().st_ino, len(ledger(self.out, "attempt"))
        os.kill(self.desk.pids()[-1][rank], signal.SIGKILL)
        began = time.monotonic()
        # An attempt puts a file of its own in the place of the one before.
        while self.metrics.stat().st_ino == before or len(ledger(self.out, "attempt")) == attempts:
            time.sleep(POLL_S)
        self.wait_past(ledger(self.out, "attempt")[-1]["start"])
        self.recoveries.append(time.monotonic() - began)


@pytest.mark.parametrize("answers", [False, True], ids=["nothing listens", "it is no Ray cluster"])
def test_a_cluster_that_can_not_be_joined_is_told_within_seconds(answers: bool) -> None:
    """Stands first: within a process that has joined a cluster, that one is used."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if not answers:
            server.close()
        began = time.monotonic()
        with pytest.raises(UnreachableError, match="expected a Ray cluster, found none that answers") as caught:
            ray_cluster(RayProfile(address=address)).__enter__()
    assert caught.value.exit_code == 6
    assert time.monotonic() - began < 20


def test_two_workers_give_the_losses_of_one_process(undisturbed: Path, job: FinetuneJob, tmp_path: Path) -> None:
    train(job, str(tmp_path / "one"), console=Console(quiet=True))
    one, two = losses(tmp_path / "one"), losses(undisturbed)
    assert [step for step, _ in one] == [step for step, _ in two]
    assert max(abs(a - b) / abs(a) for (_, a), (_, b) in zip(one, two, strict=True)) < 1e-6
    assert ledger(undisturbed, "attempt")[0]["world"] == 2


def test_workers_killed_at_three_moments_change_no_bit_of_a_run(
    undisturbed: Path, job: FinetuneJob, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Before the first checkpoint, in mid-epoch between two checkpoints, and in the last epoch; which rank is drawn too."""
    epoch = losses(undisturbed)[-1][0] // job.epochs
    draw = random.Random(20)
    moments = [draw.randint(1, 4), epoch + draw.randint(1, 5), (job.epochs - 1) * epoch + draw.randint(1, 5)]
    ranks = [draw.randint(0, 1) for _ in moments]
    assert set(ranks) == {0, 1}
    watcher, said = Watcher(tmp_path / "run"), Said()

    def kill() -> None:
        for step, rank in zip(moments, ranks, strict=True):
            watcher.kill_after(step, rank)

    assert run(job, tmp_path / "run", watch=watcher.then(kill), console=said).finished
    record_property("kill_to_first_new_step_s", watcher.recoveries)
    print(f"kill to first new step: {', '.join(f'{each:.1f} s' for each in watcher.recoveries)}")
    starts = [line["start"] for line in ledger(tmp_path / "run", "attempt")]
    assert len(starts) == 4
    assert starts[:2] == [0, 0]
    assert starts == sorted(starts)
    assert_same_run(undisturbed, tmp_path / "run", job)
    assert len(watcher.recoveries) == 3
    # The median: this machine may be doing something else for a while.
    assert sorted(watcher.recoveries)[1] < RECOVERY_S
    warnings = [line for line in said.lines if "Starting the workers again" in line]
    # Each of them came after a checkpoint that the one before had not seen.
    assert ["1 of at most 3 times" in line for line in warnings] == [True, True, True]
    assert all("its process ended" in line for line in warnings)


def test_a_run_that_lost_workers_too_often_or_was_interrupted_continues(
    undisturbed: Path, job: FinetuneJob, tmp_path: Path
) -> None:
    watcher = Watcher(tmp_path / "run")

    def kill() -> None:
        watcher.wait_past(1)
        assert watcher.desk is not None
        os.kill(watcher.desk.pids()[-1][1], signal.SIGKILL)

    with pytest.raises(DrafError, match=r"found 1 failures.*its process ended.*The same command continues") as lost:
        run(job, tmp_path / "run", PROFILE.model_copy(update={"max_failures": 0}), watch=watcher.then(kill))
    assert lost.value.exit_code == 1

    def interrupt() -> None:
        watcher.wait_past(8)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match=r"SIGTERM after step \d+ of \d+\. A checkpoint was written") as stopped:
        run(job, tmp_path / "run", watch=watcher.then(interrupt))
    assert stopped.value.exit_code == 5
    assert open_run(str(tmp_path / "run")).checkpoints.steps()[-1] == losses(tmp_path / "run")[-1][0]
    assert ledger(tmp_path / "run", "end")[-1]["outcome"] == "interrupted"

    assert run(job, tmp_path / "run", resume=True).finished
    assert_same_run(undisturbed, tmp_path / "run", job)


def test_an_error_that_the_user_must_mend_ends_a_run_at_once(job: FinetuneJob, cluster: RayCluster, s3: S3, tmp_path: Path) -> None:
    """Every shard of the training split is cut short: a rank finds out, and nothing is tried again.

    The run folder lies in a bucket whose credentials this process got after the cluster was started: the ranks have them still.
    """
    source = Path(job.release.rpartition("@")[0] or job.release)
    broken = tmp_path / "release"
    for path in source.rglob("*"):
        target = broken / path.relative_to(source)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes()
            target.write_bytes(data[: len(data) // 2] if path.match("shards/train/*.tar") else data)
    watcher, said, starts = Watcher(tmp_path), Said(), [0]

    def count_starts() -> None:
        with suppress(RayActorError):
            while watcher.desk is not None:
                starts.append(len(watcher.desk.pids()))
                time.sleep(POLL_S)

    with pytest.raises(DataError) as caught:
        run(job.model_copy(update={"release": str(broken)}), f"{s3.url}/run", console=said, watch=watcher.then(count_starts))
    assert (type(caught.value), caught.value.exit_code) == (DataError, 3)
    assert max(starts) == 1
    assert not any("again" in line for line in said.lines)


def test_a_finished_run_is_reported_and_no_worker_is_started(undisturbed: Path, job: FinetuneJob) -> None:
    started: list[Desk] = []
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    result = run(job, undisturbed, watch=started.append)
    assert result.finished
    assert result.best_loss == ledger(undisturbed, "end")[-1]["best_loss"]
    assert started == []
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_more_workers_than_the_cluster_holds_are_refused_with_what_is_there(
    job: FinetuneJob, cluster: RayCluster, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=r"room for 8 workers with 1 CPU each, found room for \d+: nodes with \d+ CPU"):
        run(job, tmp_path / "run", PROFILE.model_copy(update={"workers": 8}))


def test_a_run_is_not_removed_before_it_is_sure_that_another_can_start(undisturbed: Path, job: FinetuneJob) -> None:
    with pytest.raises(SpecError, match="found room for"):
        run(job, undisturbed, PROFILE.model_copy(update={"workers": 8}), fresh=True)
    assert open_run(str(undisturbed)).end() is not None


def test_a_local_folder_is_refused_where_there_are_other_nodes() -> None:
    with pytest.raises(SpecError, match="expected URLs that all 3 nodes reach, found --out runs, release file:///data"):
        check_reach(3, {"--out": "runs", "release": "file:///data"})
    check_reach(3, {"--out": "s3://bucket/run", "release": "s3://bucket/data"})


def test_places_on_a_node_are_limited_by_what_is_scarcest() -> None:
    node = {"CPU": 16.0, "GPU": 4.0, "memory": 1e9}
    assert places_on(node, {"CPU": 1.0}) == 16
    assert places_on(node, {"CPU": 3.0, "GPU": 1.0}) == 4
    assert places_on(node, {"CPU": 0.1}) == 160
    assert places_on({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}) == 0


def test_ranks_that_share_a_process_group_were_started_together() -> None:
    arrivals = [Arrival("a:1", 1, 11, "n", 0.0), Arrival("a:1", 0, 10, "n", 0.1), Arrival("a:2", 0, 12, "n", 9.0)]
    assert pids_by_start(arrivals) == [{1: 11, 0: 10}, {0: 12}]


def test_every_error_of_ours_survives_the_way_from_a_rank_to_the_user() -> None:
    for kind in [DrafError, *DrafError.__subclasses__()]:
        there = kind("where: expected this, found that.")
        back = as_draf_error(pickle.loads(pickle.dumps(ControllerError(there))), "url")  # noqa: S301
        assert (type(back), str(back), back.exit_code) == (kind, str(there), there.exit_code)


def test_an_error_of_someone_elses_is_named_without_its_text() -> None:
    error = gave_up("s3://b/run", 3, describe({0: ValueError("cell 'Jane Doe'")}))
    assert "3 failures without a new checkpoint between them, the last of them: rank 0: ValueError" in str(error)
    assert "Jane" not in str(error)
