"""The benchmarks of training: what they compute from what they have seen. Their runs are too long for a test."""

import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from checkpoint_report import Measured, ratios
from ettr_report import History, Kill, expected_ratio, of_ledger, schedule
from overhead_blocks import Turns


def test_kills_are_a_poisson_process_of_its_expected_number() -> None:
    kills = schedule(seed=3, seconds=60_000, mean_s=60, ranks=2)
    assert kills == schedule(seed=3, seconds=60_000, mean_s=60, ranks=2)
    assert len(kills) == 1000
    # Within four standard deviations of a fair coin.
    assert abs(sum(kill.rank for kill in kills) - len(kills) / 2) < 2 * math.sqrt(len(kills))
    gaps = [after.at_s - before.at_s for before, after in zip([Kill(0, 0), *kills], kills, strict=False)]
    assert min(gaps) >= 0
    # Of exponential gaps a share of 1/e is longer than the mean.
    assert abs(sum(gap > 60 for gap in gaps) / len(gaps) - 1 / math.e) < 0.06


def test_the_expected_ratio_is_that_of_a_simulated_run() -> None:
    draw, done, now = random.Random(5), 0, 0.0
    until = draw.expovariate(1 / 60)
    between_s, save_s, restart_s = 20.0, 2.0, 10.0
    while done < 4000:
        if now + between_s + save_s <= until:
            now, done = now + between_s + save_s, done + 1
            continue
        now = until
        # A kill during the restart begins it again.
        while (until := now + draw.expovariate(1 / 60)) < now + restart_s:
            now = until
        now += restart_s
    assert expected_ratio(between_s, save_s, restart_s, 60) == pytest.approx(done * between_s / now, rel=0.03)
    assert expected_ratio(20, 2, 10, 1e9) == pytest.approx(20 / 22)


def attempt(time: float, start: int) -> dict[str, object]:
    return {"event": "attempt", "time": time, "start": start}


def commit(time: float, stop: int) -> dict[str, object]:
    return {"event": "commit", "time": time, "stop": stop, "seconds": {"checkpoint": 0.5}}


def test_a_history_counts_every_step_once_and_knows_restarts_and_what_was_lost() -> None:
    # Killed at 160, and once more on the way back; goes on from 20, as the checkpoint of 30 never became durable.
    lines = [attempt(110, 0), commit(130, 10), commit(145, 20), commit(159, 30), attempt(190, 20), commit(200, 30)]
    history = History("ours", 100.0, 220.0, [160.0, 170.0], of_ledger(lines, durable=30), 30, [1.0])
    assert history.ratio(step_s=2.0) == 30 * 2 / 120
    assert history.restarts_s() == [30.0]
    assert history.lost_s() == [160.0 - 145.0]


def test_a_kill_before_the_first_step_loses_nothing() -> None:
    lines = [attempt(130, 0), commit(150, 10)]
    history = History("plain", 100.0, 200.0, [110.0], lines, 10, [])
    assert (history.restarts_s(), history.lost_s()) == ([20.0], [])


def test_a_commit_without_its_checkpoint_does_not_count() -> None:
    assert of_ledger([attempt(1, 0), commit(2, 10), commit(3, 20), {"event": "save"}], durable=10) == [attempt(1, 0), commit(2, 10)]


def measured(number: int, arm: str, seconds: float) -> Measured:
    return Measured(number, arm, 100, seconds, seconds, seconds, seconds, seconds, seconds, seconds, 0.1, 5)


def test_checkpoints_are_compared_in_pairs() -> None:
    found = [measured(1, "ours", 1.0), measured(1, "ray", 4.0), measured(2, "ray", 2.0), measured(2, "ours", 1.0)]
    assert {key: [pair["stall s"] for pair in pairs] for key, pairs in ratios(found).items()} == {(100, "ray"): [0.25, 0.5]}


class NeverStops:
    requested: str | None = None


def test_blocks_take_turns_and_an_epochs_end_is_left_out() -> None:
    given: list[float] = []

    def plain() -> Iterator[float]:
        while True:
            given.append(float(len(given)))
            yield given[-1]

    turns = Turns(NeverStops(), plain(), steps_per_epoch=4, pairs=2, steps=3)
    asked = 0
    while turns.requested is None:
        asked += 1
        assert asked < 20
    # A step is timed from the one before, which 1 has not; 4 and 8 are short, 5 and 9 follow a validation: 2 3 6, 7 10 11 are left.
    assert (asked + 1, len(given)) == (11, 6)
    assert [plain_s for plain_s, _ in turns.found] == [1.5, 4.5]
