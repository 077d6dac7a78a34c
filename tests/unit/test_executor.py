import math
import os
import signal
import time
from pathlib import Path

import pytest

from draf_dist.errors import DataError, InterruptedRunError
from draf_dist.executor import GRACE_S, Done, Executor, Failed, Processes, Serial

EXECUTORS = [Serial(), Processes(2)]


def square_or_refuse(number: int) -> int:
    if number == 3:
        raise DataError("shard 3: expected bytes, found none. Restore it.")
    return number * number


def quote_a_patient(cell: str) -> float:
    return float(cell)


def stop_at_two(number: int) -> int:
    if number == 2:
        raise InterruptedRunError("SIGTERM after step 5")
    return number


def die_once(marker: Path) -> str:
    if marker.exists():
        return "done"
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def die_at_one(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def who_am_i(seconds: float) -> tuple[int, str | None]:
    time.sleep(seconds)
    return os.getpid(), os.environ.get("OMP_NUM_THREADS")


@pytest.mark.parametrize("executor", EXECUTORS, ids=["serial", "processes"])
def test_every_task_has_one_outcome_and_an_error_loses_no_other(executor: Executor) -> None:
    found = {outcome.index: outcome for outcome in executor.map(square_or_refuse, range(6))}
    failed = found.pop(3)
    assert {index: outcome.value for index, outcome in found.items()} == {0: 0, 1: 1, 2: 4, 4: 16, 5: 25}
    assert isinstance(failed, Failed)
    assert (failed.message, failed.exit_code) == ("shard 3: expected bytes, found none. Restore it.", DataError.exit_code)


@pytest.mark.parametrize("executor", EXECUTORS, ids=["serial", "processes"])
def test_an_error_that_nobody_foresaw_quotes_no_data(executor: Executor) -> None:
    (failed,) = executor.map(quote_a_patient, ["Doe, Jane"])
    assert isinstance(failed, Failed)
    assert failed.message.startswith("ValueError in test_executor.py line ")
    assert "Doe" in failed.trace


@pytest.mark.parametrize("executor", EXECUTORS, ids=["serial", "processes"])
def test_an_interrupted_task_ends_everything(executor: Executor) -> None:
    with pytest.raises(InterruptedRunError, match="after step 5"):
        list(executor.map(stop_at_two, range(50)))


def test_serial_keeps_the_order() -> None:
    assert [outcome.index for outcome in Serial().map(math.sqrt, [9.0, 4.0, 1.0])] == [0, 1, 2]


def test_processes_run_at_the_same_time_with_one_thread_each_and_yield_what_ends_first() -> None:
    outcomes = list(Processes(2).map(who_am_i, [3.0, 0.0, 0.0]))
    assert [outcome.index for outcome in outcomes] == [1, 2, 0]
    values = [outcome.value for outcome in outcomes if isinstance(outcome, Done)]
    assert len({pid for pid, _ in values} - {os.getpid()}) == 2
    assert {threads for _, threads in values} == {"1"}


def test_a_task_whose_process_was_killed_is_tried_again(tmp_path: Path) -> None:
    (outcome,) = Processes(2).map(die_once, [tmp_path / "marker"])
    assert outcome == Done(0, "done")


def test_a_task_that_kills_its_process_every_time_fails_alone() -> None:
    found = {outcome.index: outcome for outcome in Processes(2).map(die_at_one, range(4))}
    failed = found.pop(1)
    assert [found[index].value for index in (0, 2, 3)] == [0, 2, 3]
    assert isinstance(failed, Failed)
    assert "SIGKILL" in failed.message


def test_leaving_early_ends_the_processes() -> None:
    outcomes = Processes(2).map(who_am_i, [0.0, 60.0])
    first = next(outcomes)
    assert isinstance(first, Done)
    began = time.monotonic()
    outcomes.close()
    assert time.monotonic() - began < GRACE_S / 2
    with pytest.raises(ProcessLookupError):
        os.kill(first.value[0], 0)
