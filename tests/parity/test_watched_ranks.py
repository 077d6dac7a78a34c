"""Of two ranks, the one that is slow or does not arrive is named, by itself and by the other."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import run_on_ranks
from rich.console import Console
from small_runs import silent, small_job, small_release
from torch.distributed import distributed_c10d as c10d

from draf_dist.schema.batch import Batch
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.finetune import Finetuning
from draf_dist.training.interrupt import Interrupt
from draf_dist.training.job import FinetuneJob
from draf_dist.training.loop import StepRules
from draf_dist.training.replay import replay
from draf_dist.training.run import attempt, begin
from draf_dist.training.run_folder import open_run
from draf_dist.training.watch import watchdog
from draf_dist.training.watch.flight import read_flight
from draf_dist.training.watch.watchdog import HungError

SLOW_FROM, SLEEP_S = 4, 0.3
HUNG_AT = 8
WORLD = 2


def before_each_step(act: Callable[[int], None]) -> None:
    """Calls act(step), steps counted from 1 in this process, when a batch is prepared."""
    rules_of = Finetuning.rules

    def rules(self: Finetuning, backend: Any) -> StepRules:
        rules, steps = rules_of(self, backend), []

        def prepare(batch: Batch) -> Batch:
            steps.append(len(steps) + 1)
            act(steps[-1])
            return rules.prepare(batch)

        return replace(rules, prepare=prepare)

    Finetuning.rules = rules  # type: ignore[method-assign]


def backend() -> DeepSpeedRanks:
    return DeepSpeedRanks(DeepSpeedConfig.model_validate({"zero_stage": 1}), torch.device("cpu"))


def train_slowly(rank: int, world: int, url: str, told: str) -> None:
    """The second rank sleeps from a step on."""
    if rank == 1:
        before_each_step(lambda step: time.sleep(SLEEP_S if step > SLOW_FROM else 0.0))
    with Path(told).open("w") if rank == 0 else Path("/dev/null").open("w") as lines:
        attempt(url, backend(), Console(file=lines), Interrupt())


def train_until_hung(rank: int, world: int, url: str, told: str) -> None:
    """The second rank does not come out of a step; the group's timeout ends the first, once the watchdog has looked around."""
    watchdog.FLOOR_S, watchdog.POLL_S = 1.0, 0.1
    c10d._set_pg_timeout(timedelta(seconds=5), c10d._get_default_group())
    if rank == 1:
        before_each_step(lambda step: time.sleep(7.0 if step == HUNG_AT else 0.0))
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        attempt(url, backend(), silent(), Interrupt())
    if rank == 0:
        assert time.monotonic() - began < 60
        Path(told).write_text(f"{isinstance(caught.value, HungError)}\n{caught.value}")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> FinetuneJob:
    release = small_release(tmp_path_factory.mktemp("data"), num_subjects=60, seed=1)
    return small_job(release, epochs=3, checkpoint={"every_steps": 50, "keep": 9}, passes_train=1, passes_eval=1)


@pytest.fixture(scope="module")
def slowly(job: FinetuneJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slowly") / "run"
    run_on_ranks(train_slowly, WORLD, begin(job, str(out)).url, str(out.parent / "told"))
    return out


def test_a_rank_that_sleeps_at_every_step_is_named_within_twenty(slowly: Path) -> None:
    (line,) = [line for line in open_run(str(slowly)).ledger() if line["event"] == "slow"]
    assert line["rank"] == 1
    assert line["of"] == "its forward"
    assert line["step"] - SLOW_FROM <= 20
    assert line["own_s"] > SLEEP_S > 2 * line["others_s"]
    assert "rank 1 is slow" in (slowly.parent / "told").read_text()


def test_a_step_of_two_ranks_done_again_in_one_process_is_what_was_recorded(slowly: Path) -> None:
    found = replay(str(slowly), 8)
    assert found.world == WORLD
    assert found.difference is not None
    assert 0 < found.difference < 1e-6
    assert found.agrees
    assert [row.rank for row in found.rows] == [0] * 4 + [1] * 4


def test_a_rank_that_does_not_arrive_is_named_and_every_rank_leaves_its_stacks(job: FinetuneJob, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_on_ranks(train_until_hung, WORLD, begin(job, str(out)).url, str(tmp_path / "told"))
    hung, _, message = (tmp_path / "told").read_text().partition("\n")
    assert hung == "True"
    assert f"step {HUNG_AT}: expected all 2 ranks" in message
    assert "found rank 1: computing" in message
    assert "rank 0" not in message
    for rank in range(WORLD):
        flight = read_flight(open_run(str(out)).store, 1, rank)
        assert flight["steps"][-1]["step"] == HUNG_AT
        first = flight["troubles"][0]
        assert "found rank 1: computing" in first["what"]
        main = next(lines for name, lines in first["stacks"].items() if name.startswith("MainThread"))
        wanted = "torch.distributed.distributed_c10d" if rank == 0 else "test_watched_ranks"
        assert any(wanted in line for line in main), json.dumps(main)
