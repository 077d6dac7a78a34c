"""The executor on a Ray cluster of this machine keeps the promises of the others."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import cloudpickle
from small_runs import silent, small_job, small_release

from draf_dist.data.corruption import EhrNoise
from draf_dist.errors import DataError
from draf_dist.evaluation.evaluate import evaluate
from draf_dist.evaluation.job import EvaluateJob, SweepSettings
from draf_dist.evaluation.parts import Place
from draf_dist.evaluation.spread import ONE_PROCESS, Workers
from draf_dist.executor import Done, Failed
from draf_dist.launch.profile import RayProfile
from draf_dist.launch.ray_cluster import ray_cluster
from draf_dist.launch.ray_executor import RayExecutor
from draf_dist.training.interrupt import Interrupt
from draf_dist.training.run import train

# A worker has no tests to import.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


PROFILE = RayProfile(workers=2)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One for all tests: to start it takes longer than they do."""
    with ray_cluster(PROFILE):
        yield


def square_refuse_or_die(number: int) -> int:
    if number == 1:
        raise DataError("shard 1: expected bytes, found none. Restore it.")
    if number == 2:
        os._exit(9)
    return number * number


def listen_like_training(marker: Path) -> None:
    if marker.name == "first":
        return
    with Interrupt() as interrupt:
        marker.with_name("began").touch()
        while interrupt.requested is None:
            time.sleep(0.02)
    marker.touch()


def test_neither_an_error_nor_a_dead_worker_loses_another_task(tmp_path: Path) -> None:
    executor = RayExecutor(PROFILE, str(tmp_path))
    found = {outcome.index: outcome for outcome in executor.map(square_refuse_or_die, range(5))}
    refused, dead = found.pop(1), found.pop(2)
    assert found == {index: Done(index, index * index) for index in (0, 3, 4)}
    assert isinstance(refused, Failed)
    assert (refused.message, refused.exit_code) == ("shard 1: expected bytes, found none. Restore it.", DataError.exit_code)
    assert isinstance(dead, Failed)
    assert dead.message == "its Ray worker ended (WorkerCrashedError)"


def test_leaving_early_lets_training_write_its_checkpoint(tmp_path: Path) -> None:
    executor = RayExecutor(PROFILE, str(tmp_path))
    outcomes = executor.map(listen_like_training, [tmp_path / "first", tmp_path / "checkpoint"])
    assert next(outcomes) == Done(0, None)
    while not (tmp_path / "began").exists():
        time.sleep(0.02)
    outcomes.close()
    assert (tmp_path / "checkpoint").exists()


def test_workers_of_a_cluster_evaluate_to_the_bytes_of_one_process(tmp_path: Path) -> None:
    job = small_job(small_release(tmp_path, num_subjects=60, seed=1), epochs=1)
    run = Path(train(job, str(tmp_path / "run"), console=silent()).url)
    settings = EvaluateJob(passes=3, batch_size=4, bootstrap=0, sweep=SweepSettings(operations=(EhrNoise(),), passes=2))
    found = []
    for workers in (ONE_PROCESS, Workers(RayExecutor(PROFILE, str(run)), Place())):
        evaluate(str(run), settings, workers=workers)
        paths = [run / "evaluation.json", run / "report.html", *sorted((run / "predictions").iterdir())]
        found.append([path.read_bytes() for path in paths])
    assert found[0] == found[1]
