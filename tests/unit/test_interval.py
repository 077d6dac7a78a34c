"""How often to save: closed forms, a brute force, published figures, and what a run has measured."""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from scipy.optimize import minimize_scalar
from scipy.special import lambertw
from sharded import sharded_release
from small_runs import small_job
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.cli.plan import plan
from draf_dist.config.spec import canonical_json
from draf_dist.errors import DataError, SpecError
from draf_dist.storage import open_store
from draf_dist.training.interval import (
    PUBLISHED_RANK_S,
    Costs,
    advise,
    daly_s,
    epoch_saves,
    epoch_waste,
    recommended,
    waste,
    young_s,
)
from draf_dist.training.journal import Line
from draf_dist.training.run_folder import RunFolder

HOUR = 3600.0
NOW = 1.8e9


@pytest.mark.parametrize(("save_s", "mtbf_s"), [(0.5, 600.0), (30.0, HOUR), (30.0, 8 * HOUR), (60.0, 60.0)])
def test_the_least_expected_time_is_where_lambert_says(save_s: float, mtbf_s: float) -> None:
    exact = mtbf_s * (1 + lambertw(-math.exp(-1 - save_s / mtbf_s)).real)
    found = minimize_scalar(lambda tau: waste(tau, save_s, 0.0, 0.0, mtbf_s), bounds=(save_s / 100, 4 * mtbf_s), method="bounded")
    assert exact == pytest.approx(found.x, rel=1e-3)
    assert waste(exact, save_s, 0.0, 90.0, mtbf_s) == min(waste(exact * by, save_s, 0.0, 90.0, mtbf_s) for by in (0.9, 1.0, 1.1))


@pytest.mark.parametrize("ratio", [1e-5, 1e-3, 1e-2, 1 / 8])
def test_the_recommended_interval_is_the_best_within_a_thousandth(ratio: float) -> None:
    exact = 1 + lambertw(-math.exp(-1 - ratio)).real
    assert daly_s(ratio, 1.0) == pytest.approx(exact, rel=1e-3)
    assert abs(daly_s(ratio, 1.0) - exact) < abs(young_s(ratio, 1.0) - exact)


def test_where_a_save_takes_longer_than_two_failures_are_apart_nothing_better_is_known() -> None:
    assert daly_s(3.0, 1.0) == 1.0
    assert waste(1.0, 3.0, 0.0, 1e6, 1.0) == 1.0


@pytest.mark.parametrize(
    ("gpus", "minutes", "lost"), [(8, 4.1 * 60, None), (64, 87, 0.012), (256, 44, None), (1024, 22, 0.046)], ids=str
)
def test_the_published_failures_give_the_known_intervals(gpus: int, minutes: float, lost: float | None) -> None:
    """A save of 30 s and the failures of a research cluster, 7.9 h apart at 1,024 GPUs."""
    mtbf_s = PUBLISHED_RANK_S / gpus
    assert young_s(30.0, mtbf_s) / 60 == pytest.approx(minutes, rel=0.015)
    assert daly_s(30.0, mtbf_s) == pytest.approx(young_s(30.0, mtbf_s), rel=0.02)
    if lost is not None:
        assert waste(young_s(30.0, mtbf_s), 30.0, 0.0, 0.0, mtbf_s) == pytest.approx(lost, rel=0.05)


def lived_through(interval_s: float, save_s: float, durable_s: float, restart_s: float, mtbf_s: float) -> float:
    """The share of the time that is not used in a run of 20,000 intervals, failure by failure.

    A save is there `durable_s` after training has gone on, and the next one waits for it; a failure before that goes back to the
    one before it.
    """
    draw, num = random.Random(0), 20_000
    clock, fails, due = 0.0, draw.expovariate(1 / mtbf_s), 0.0
    reached = kept = 0
    while reached < num:
        end = max(clock + interval_s, due) + save_s
        if end <= fails:
            kept, reached, clock, due = reached, reached + 1, end, end + durable_s
            continue
        reached = kept = reached if due <= fails else kept
        clock, due, fails = fails, 0.0, fails + draw.expovariate(1 / mtbf_s)
        while fails < clock + restart_s:
            clock, fails = fails, fails + draw.expovariate(1 / mtbf_s)
        clock += restart_s
    return 1 - num * interval_s / clock


@pytest.mark.parametrize(
    ("save_s", "durable_s", "restart_s", "mtbf_s"), [(30.0, 0.0, 120.0, HOUR), (5.0, 60.0, 20.0, HOUR), (1.0, 5.0, 12.0, 60.0)]
)
def test_a_run_through_thousands_of_failures_wastes_as_much(
    save_s: float, durable_s: float, restart_s: float, mtbf_s: float
) -> None:
    interval_s = max(daly_s(save_s, mtbf_s), durable_s)
    costs = (save_s, durable_s, restart_s, mtbf_s)
    assert lived_through(interval_s, *costs) == pytest.approx(waste(interval_s, *costs), rel=0.04)
    for by in (0.4, 2.5):
        assert lived_through(interval_s * by, *costs) > waste(interval_s, *costs)


@pytest.mark.parametrize("interval_s", [1.0, 5.0, 30.0])
def test_saves_that_wait_for_one_another_waste_as_much(interval_s: float) -> None:
    """Intervals shorter than a save is on its way."""
    costs = (2.0, 60.0, 30.0, 600.0)
    assert lived_through(interval_s, *costs) == pytest.approx(waste(interval_s, *costs), rel=0.04)
    assert waste(interval_s, *costs) > 1 - interval_s / 60.0


def step(number: int, seconds: float) -> Line:
    return {"event": "step", "step": number, "wait_s": 0.5, "compute_s": seconds - 0.5, "time": NOW + number}


def measured_run(folder: Path, *, killed: bool, waits_s: float = 0.0, end: Line | None = None) -> RunFolder:
    """A hundred steps of 2 s with a save every ten, of which training waits 0.25 s; the step after each takes 1 s longer.

    waits_s: for the save before, besides. end: what the first attempt says of its end.
    """
    commits = [commit(number, 24.0 + waits_s, checkpoint=(0.25 + waits_s) if number else 0.0, step=20.0) for number in range(10)]
    behind = {"books_s": 23.25 if waits_s else 0.0, "upload_s": waits_s or 2.0, "commit_s": 0.5}
    saves = [{"event": "save", "attempt": 1, "step": 10 * n, **behind, "time": NOW} for n in range(1, 10)]
    again = {"before": {"done": 104, "time": NOW + 250.0, "lost_s": 8.0}}
    lines = [
        attempt(1, 0, 0.0),
        *commits,
        *saves,
        *([] if end is None else [end]),
        *([attempt(2, 100, 262.0, **again)] if killed else []),
    ]
    metrics = [step(number, 3.0 if number % 10 == 1 and number > 1 else 2.0) for number in range(1, 101)]
    store = open_store(str(folder))
    for path, content in (("ledger.jsonl", lines), ("metrics.jsonl", metrics)):
        store.write(path, "".join(json.dumps(line) + "\n" for line in content).encode())
    return RunFolder(store, small_job("nowhere"))


def attempt(number: int, start: int, began: float, **facts: Any) -> Line:
    return {"event": "attempt", "attempt": number, "start": start, "began": NOW + began, "time": NOW + began + 1, **facts}


def commit(number: int, seconds: float, **spent: float) -> Line:
    booked = {**spent, "startup" if number == 0 else "other": seconds - sum(spent.values())}
    known = {"start": 10 * number, "stop": 10 * number + 10, "receipts": {}, "seconds": booked}
    return {"event": "commit", "attempt": 1, **known, "time": NOW + seconds * (number + 1)}


def test_the_advice_rests_on_what_the_run_measured(tmp_path: Path) -> None:
    advice = advise(measured_run(tmp_path, killed=True), every_steps=500, steps_per_epoch=300, world=2, failures_per_day=24.0)
    assert advice.costs == Costs(
        save_s=0.25, slowed_s=1.0, durable_s=2.5, restart_s=13.0, step_s=pytest.approx(2.09), saves=9, restarts=1
    )
    # The best interval has 45 steps: seven even parts of an epoch are 43.
    assert (round(daly_s(1.25, HOUR) / 2.09), advice.every_steps, advice.epoch_saves) == (45, 43, 7)
    assert advice.waste == pytest.approx(waste(300 / 7 * 2.09, 1.25, 2.5, 13.0, HOUR), rel=1e-3)
    assert (advice.job_every_steps, advice.job_epoch_saves, advice.mtbf_source) == (300, 1, "given")
    assert advice.job_waste > advice.waste


def test_failures_are_those_of_the_run_or_published_ones(tmp_path: Path) -> None:
    killed = advise(measured_run(tmp_path / "a", killed=True), every_steps=10, steps_per_epoch=1000, world=2)
    assert (killed.mtbf_s, killed.mtbf_source, killed.failures) == (263.0, "measured", 1)
    whole = advise(measured_run(tmp_path / "b", killed=False), every_steps=10, steps_per_epoch=1000, world=64)
    assert (whole.mtbf_s, whole.mtbf_source) == (pytest.approx(126.4 * HOUR), "published")
    assert (whole.every_steps, whole.costs.restart_s) == (500, 4.0)
    assert daly_s(1.25, whole.mtbf_s) == pytest.approx(500 * 2.09, rel=0.05)


@pytest.mark.parametrize("steps", [1, 7, 27, 100, 1000])
@pytest.mark.parametrize(("save_s", "durable_s"), [(0.5, 0.0), (0.5, 20.0), (30.0, 60.0)])
@pytest.mark.parametrize("mtbf_s", [60.0, HOUR])
def test_of_all_intervals_of_an_epoch_the_best_is_recommended(steps: int, save_s: float, durable_s: float, mtbf_s: float) -> None:
    costs = Costs(save_s, 0.0, durable_s, restart_s=10.0, step_s=1.5, saves=9, restarts=1)
    best = min(range(1, steps + 1), key=lambda every: epoch_waste(steps, every, costs, mtbf_s))
    found = recommended(steps, costs, mtbf_s)
    assert epoch_waste(steps, found, costs, mtbf_s) <= epoch_waste(steps, best, costs, mtbf_s) * 1.005


def test_an_epoch_wastes_what_all_its_intervals_take() -> None:
    costs = Costs(2.0, 1.0, 9.0, restart_s=10.0, step_s=1.5, saves=9, restarts=1)
    of = (3.0, 9.0, 10.0, 600.0)
    assert epoch_waste(27, 27, costs, 600.0) == waste(27 * 1.5, *of)
    assert epoch_waste(27, 9, costs, 600.0) == pytest.approx(waste(9 * 1.5, *of))
    takes = [steps * 1.5 / (1 - waste(steps * 1.5, *of)) for steps in (8, 8, 8, 3)]
    assert epoch_waste(27, 8, costs, 600.0) == pytest.approx(1 - 27 * 1.5 / sum(takes))
    assert (epoch_saves(27, 8), epoch_saves(27, 9), epoch_saves(27, 27)) == (4, 3, 1)


def test_a_job_that_saves_more_often_than_a_save_takes_is_told_what_its_waits_cost(tmp_path: Path) -> None:
    """A step takes 2.09 s, a save 1.25 s of training and 2.5 s behind it: with one after every step 1.66 of 3.75 s are waste."""
    run = measured_run(tmp_path, killed=True)
    assert advise(run, every_steps=1, steps_per_epoch=1000, world=1, failures_per_day=1.0).job_waste > 0.4


def test_what_a_measured_save_waited_for_the_one_before_is_not_its_own_cost(tmp_path: Path) -> None:
    run = measured_run(tmp_path, killed=False, waits_s=6.0)
    costs = advise(run, every_steps=10, steps_per_epoch=1000, world=1).costs
    assert (costs.save_s, costs.durable_s) == (0.25, 29.75)


def test_what_the_run_or_its_user_brought_about_is_no_failure_to_be_expected(tmp_path: Path) -> None:
    end = {"event": "end", "attempt": 1, "steps": 100, "done": 104, "seconds": {"step": 8.0}, "time": NOW + 248.0}
    ways: tuple[Line, ...] = (
        {"outcome": "rolled_back", "reason": "bad loss"},
        {"outcome": "failed", "reason": "DataError", "foreseen": True},
    )
    for number, how in enumerate(ways):
        run = measured_run(tmp_path / str(number), killed=True, end={**end, **how})
        advice = advise(run, every_steps=10, steps_per_epoch=1000, world=64)
        assert (advice.mtbf_source, advice.failures) == ("published", 0)
        assert (advice.costs.restart_s, advice.costs.restarts) == (4.0, 0)
    broke = {"outcome": "failed", "reason": "RuntimeError", "foreseen": False}
    run = measured_run(tmp_path / "broke", killed=True, end={**end, **broke})
    assert advise(run, every_steps=10, steps_per_epoch=1000, world=64).failures == 1


def test_it_is_never_less_often_than_a_save_takes(tmp_path: Path) -> None:
    advice = advise(measured_run(tmp_path, killed=True), every_steps=1, steps_per_epoch=1000, world=1, failures_per_day=1e6)
    assert advice.every_steps * advice.costs.step_s >= 0.5 * advice.costs.durable_s


def test_the_plan_shows_it_beside_what_is_read(tmp_path: Path) -> None:
    release = sharded_release(tmp_path / "release")
    (tmp_path / "job.json").write_text(json.dumps(small_job(release.pinned_url).model_dump(mode="json")))
    run = measured_run(tmp_path / "run", killed=True)
    run.store.write("job.yaml", canonical_json(run.job.model_dump(mode="json")))
    words = ["plan", str(tmp_path / "job.json"), "--measured", run.url]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    epoch = found["steps_per_epoch"]
    advice = advise(run, every_steps=small_job("nowhere").checkpoint.every_steps, steps_per_epoch=epoch, world=1)
    assert found["checkpoint"] == asdict(advice)
    shown = CliRunner().invoke(app, words).stdout
    assert "checkpoint.every_steps" in shown
    assert f"{advice.waste:.2%}" in shown


def test_failures_are_asked_for_with_a_measured_run_only(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="expected --measured RUN beside it"):
        plan(tmp_path / "job.yaml", failures_per_day=3.0)


def test_a_run_that_has_not_saved_says_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(DataError, match="a run that has measured its saves"):
        advise(RunFolder(store, small_job("nowhere")), every_steps=1, steps_per_epoch=9, world=1)
