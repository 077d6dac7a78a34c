"""The executor on a Ray cluster of this machine keeps the promises of the others."""

import os
import sys
import time
from pathlib import Path

from ray import cloudpickle

from draf_dist.errors import DataError
from draf_dist.executor import Done, Failed
from draf_dist.launch.profile import RayProfile
from draf_dist.launch.ray_executor import RayExecutor
from draf_dist.training.interrupt import Interrupt

# A worker has no tests to import.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


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
    executor = RayExecutor(RayProfile(workers=2), str(tmp_path))
    found = {outcome.index: outcome for outcome in executor.map(square_refuse_or_die, range(5))}
    refused, dead = found.pop(1), found.pop(2)
    assert found == {index: Done(index, index * index) for index in (0, 3, 4)}
    assert isinstance(refused, Failed)
    assert (refused.message, refused.exit_code) == ("shard 1: expected bytes, found none. Restore it.", DataError.exit_code)
    assert isinstance(dead, Failed)
    assert dead.message == "its Ray worker ended (WorkerCrashedError)"


def test_leaving_early_lets_training_write_its_checkpoint(tmp_path: Path) -> None:
    executor = RayExecutor(RayProfile(workers=2), str(tmp_path))
    outcomes = executor.map(listen_like_training, [tmp_path / "first", tmp_path / "checkpoint"])
    assert next(outcomes) == Done(0, None)
    while not (tmp_path / "began").exists():
        time.sleep(0.02)
    outcomes.close()
    assert (tmp_path / "checkpoint").exists()
