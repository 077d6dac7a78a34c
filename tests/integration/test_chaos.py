"""Runs on the nodes of a real cluster and S3, to which things happen: what comes of them is what would have been.

One loses a worker and its server; the other a node, gets one, and leaves one that will be taken away. benchmarks/chaos_training.py
does that with every kind of failure, and with workers at twenty moments.
"""

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from disturbed_moments import at_put, while_launching
from disturbed_runs import CONTROLLER, DisturbedRun, Place, Seen, a_place, held, undisturbed
from rich.console import Console

from draf_dist.launch.ray_elastic import PREEMPTION, RESIZE, SETTLE_S
from draf_dist.training.ledger import receipts_by_epoch
from draf_dist.training.run import train
from draf_dist.training.run_folder import RunFolder, open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# Gloo waits so long for a rank that is gone: a lost node must be noticed long before.
COLLECTIVE_TIMEOUT_S = 600
PAUSE_S = 1.0


class ElasticPlace(Place):
    """Of one or two workers."""

    def command(self, url: str) -> list[str]:
        how_many = {"workers": 2, "min_workers": 1, "resize_pause_s": PAUSE_S, "max_failures": 1}
        there = {"kind": "ray", "address": self.ray.address, "collective_timeout_s": COLLECTIVE_TIMEOUT_S}
        profile = self.folder / "profile.json"
        profile.write_text(json.dumps(there | how_many))
        options = ["train", str(self.folder / "job.yaml"), "--profile", str(profile), "--out", url]
        return [sys.executable, "-m", "draf_dist.cli.app", *options]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with a_place(tmp_path_factory.mktemp("place"), raylets=1, epochs=20) as found:
        yield found


@contextmanager
def held_up(run: DisturbedRun) -> Iterator[None]:
    """Its ranks stand still meanwhile: starting a node takes longer than the steps that are left."""
    pids = run.rank_processes()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def notice(pid: int) -> None:
    """SIGTERM to `ray start` on the node of a process, as Kubernetes ends a pod: Ray then gives itself 30 s."""
    node = next(parent for parent in psutil.Process(pid).parents() if "ray.scripts.scripts" in parent.cmdline())
    node.terminate()


def told(run: DisturbedRun, what: str) -> int:
    """Waits for a line about nodes; the step that it names."""
    found = run.until(lambda: re.search(what, run.said()))
    return int(found.group(1))


def wait_for_step_of(run: DisturbedRun, attempt: int) -> Seen:
    return run.until(lambda: seen if (seen := run.trains(1)) is not None and seen.attempt >= attempt else None)


def losses(folder: RunFolder) -> list[float]:
    return [line["loss"] for line in folder.metrics() if line["event"] == "step"]


def test_a_run_that_lost_a_worker_and_its_server_is_the_undisturbed_run(place: Place) -> None:
    expected = undisturbed(place)
    run = DisturbedRun(place, "disturbed")
    run.start()
    run.kill(*at_put(random.Random(6), 7, "uploading its part", "rank-00000.safetensors").wait(run))
    run.wait_for_new_step()
    with held(run, "PUT", "manifest.json") as arrived:
        run.until(arrived)
        place.server.stop()
        place.server.start()
    run.finish()
    assert run.wrong(expected) == []
    assert [failure.seconds is not None for failure in run.failures] == [True]
    assert len(run.ledger("attempt")) == 2


def test_a_worker_lost_while_it_is_launched_and_the_controller_of_ray_train_are_started_again(place: Place) -> None:
    expected = undisturbed(place)
    run = DisturbedRun(place, "launched")
    run.start()
    run.kill(*while_launching(random.Random(7)).wait(run))
    run.wait_for_new_step()
    run.kill(place.processes_of(CONTROLLER)[-1], "Ray Train's controller")
    run.finish()
    assert run.wrong(expected) == []
    assert "a worker was lost before it began" in run.said()
    assert "the controller of Ray Train was lost" in run.said()


def test_a_node_lost_one_come_and_one_taken_away_change_nothing_but_the_number_of_workers(
    place: Place, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    place = ElasticPlace(**vars(place))
    run = DisturbedRun(place, "elastic")
    run.start()
    run.until(lambda: run.trains(15))
    place.ray.kill_node(1)
    run.failed("a node")
    after_loss = told(run, r"A node was lost: going on with 1 of 2 workers from step (\d+)")
    run.wait_for_new_step()

    with held_up(run):
        place.ray.add_node()
        time.sleep(SETTLE_S + PAUSE_S)
    asked = time.monotonic()
    after_growth = told(run, r"A node came: 2 of 2 workers from step (\d+)")
    wait_for_step_of(run, 3)
    grown_s = time.monotonic() - asked

    with held_up(run):
        notice(next(pid for pid in run.rank_processes() if place.ray.node_of(pid) == place.ray.raylets[0]))
        asked = time.monotonic()
    after_notice = told(run, r"A node will be taken away: checkpoint at step (\d+), going on with 1 of 2 workers")
    wait_for_step_of(run, 4)
    moved_s = time.monotonic() - asked
    run.finish()

    seconds = {"lost": run.failures[0].seconds, "grown": grown_s, "moved": moved_s}
    record_property("seconds_to_first_new_step", seconds)
    print(", ".join(f"{what}: {each:.1f} s" for what, each in seconds.items() if each))
    folder = open_run(run.url)
    attempts = run.ledger("attempt")
    assert [line["world"] for line in attempts] == [2, 1, 2, 1]
    assert [line["start"] for line in attempts] == [0, after_loss, after_growth, after_notice]
    place.epoch_steps = len(losses(folder)) // place.job.epochs
    assert run.lost_too_much(run.failures[0]) is None
    # A rank that survives its peer says that it failed, if it keeps the books and has the time to.
    ends = [(line["outcome"], line.get("reason"), line["steps"]) for line in run.ledger("end") if line["outcome"] != "failed"]
    assert ends[:2] == [("interrupted", RESIZE, after_growth), ("interrupted", PREEMPTION, after_notice)]
    # A node that was lost counts, a notice and a node that came do not.
    assert run.said().count("1 of at most 1 times") == 1

    train(place.job, str(tmp_path / "one"), console=Console(quiet=True))
    one = open_run(str(tmp_path / "one"))
    assert len(losses(folder)) == len(losses(one))
    assert max(abs(a - b) / abs(a) for a, b in zip(losses(one), losses(folder), strict=True)) < 1e-6
    receipts = [receipts_by_epoch(each.ledger()) for each in (folder, one)]
    assert receipts[0] == receipts[1]
    assert sorted(receipts[0]) == list(range(place.job.epochs))
