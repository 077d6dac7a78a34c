"""What is known of an attempt that was killed: from progress.json, and from the lines of metrics.jsonl past its last commit."""

import json
import time
from pathlib import Path

import pytest

from draf_dist.storage import Store, open_store
from draf_dist.training.tracking import METRICS
from draf_dist.training.watch import last_step as module
from draf_dist.training.watch.last_step import PROGRESS, LastStep, Progress, last_step

BEGAN = {"event": "attempt", "attempt": 2, "start": 4, "began": 1000.0, "time": 1001.0}
LEDGER = [BEGAN, {"event": "commit", "attempt": 2, "start": 4, "stop": 8}]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def log(store: Store, *steps: int) -> None:
    lines = [{"event": "step", "step": step, "wait_s": 0.5, "compute_s": 1.0, "time": 1000.0 + step} for step in steps]
    store.write(METRICS, "".join(f"{json.dumps(line)}\n" for line in lines).encode())


def written(store: Store, attempt: int, step: int) -> None:
    store.write(PROGRESS, json.dumps({"attempt": attempt, "step": step, "time": 7.0, "lost_s": 3.0}).encode())


def test_the_newest_step_is_written_behind_training(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.01)
    with Progress(store, 2) as progress:
        progress.at(9, 1.25)
        progress.at(10, 2.5)
        deadline = time.monotonic() + 30
        while not store.exists(PROGRESS) and time.monotonic() < deadline:
            time.sleep(0.005)
    found = last_step(store, LEDGER)
    assert found is not None
    assert (found.attempt, found.step, found.lost_s) == (2, 10, 2.5)
    assert abs(found.time - time.time()) < 60


def test_the_lines_past_the_last_commit_say_what_their_steps_took(store: Store) -> None:
    log(store, 7, 8, 9, 10)
    assert last_step(store, LEDGER) == LastStep(2, 10, 1010.0, 3.0)


def test_whichever_is_later_counts(store: Store) -> None:
    log(store, 9, 10)
    written(store, 2, 12)
    assert last_step(store, LEDGER) == LastStep(2, 12, 7.0, 3.0)
    written(store, 2, 9)
    assert last_step(store, LEDGER) == LastStep(2, 10, 1010.0, 3.0)


def test_what_another_attempt_wrote_says_nothing_of_this_one(store: Store) -> None:
    written(store, 1, 12)
    assert last_step(store, LEDGER) is None


def test_what_is_committed_is_known_already(store: Store) -> None:
    log(store, 7, 8)
    written(store, 2, 8)
    assert last_step(store, LEDGER) is None


def test_an_attempt_that_said_how_it_ended_is_asked_nothing_more(store: Store) -> None:
    log(store, 9, 10)
    assert last_step(store, [*LEDGER, {"event": "end", "attempt": 2}]) is None
    assert last_step(store, []) is None


def test_what_an_earlier_attempt_left_past_the_commit_says_nothing_of_this_one(store: Store) -> None:
    """Each that dies between its line in the ledger and its first step would be said to have lost the same steps once more."""
    log(store, 9, 10)
    assert last_step(store, LEDGER) == LastStep(2, 10, 1010.0, 3.0)
    again = {"event": "attempt", "attempt": 3, "start": 8, "began": 1010.5, "time": 1011.0}
    assert last_step(store, [*LEDGER, again]) is None
    log(store, 9, 10, 11)
    assert last_step(store, [*LEDGER, again]) == LastStep(3, 11, 1011.0, 1.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0" * 40,
        '{"attempt": 2, "st',
        "[]",
        '{"attempt": 2, "step": 12, "time": 7.0}',
        '{"attempt": 2, "step": 12, "time": 7.0, "lost_s": 3.0, "x": 2}',
        '{"attempt": 2, "step": null, "time": 7.0, "lost_s": 3.0}',
        '{"attempt": 2, "step": 12, "time": 7.0, "lost_s": NaN}',
    ],
)
def test_what_can_not_be_read_is_as_if_it_were_not_there(store: Store, text: str) -> None:
    store.write(PROGRESS, text.encode())
    assert last_step(store, LEDGER) is None
    log(store, 9, 10)
    assert last_step(store, LEDGER) == LastStep(2, 10, 1010.0, 3.0)
