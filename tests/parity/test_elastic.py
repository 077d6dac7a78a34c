"""What is trained is the same when ranks come and go: 2, then 1, then 3 of them, with any ZeRO stage; and continued, bit for bit.

All cases of one world size share one set of processes: starting them costs more than training.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked_ranks import run_on_ranks
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from small_engines import new_model, objective

from draf_dist.data.order import rank_entries
from draf_dist.models.fusion import FusionConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.schema.batch import Batch
from draf_dist.training.backend import Backend
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.fragments import HostCopy, WholeTensors
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.loop import StepRules, train_steps
from draf_dist.training.repeatable import repeatable
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import TrainState
from draf_dist.training.torch_engine import OneProcess

MODELS, STAGES = ("draf", "mean", "simclr"), (0, 1, 2, 3)
FUSION: dict[str, FusionConfig | None] = {
    "draf": DrafConfig(width=8, encoders=SMALL_ENCODERS),
    "mean": MeanConfig(width=8, encoders=SMALL_ENCODERS),
    "simclr": None,
}
# Two ranks train up to the first of these steps, one process up to the second, three ranks to the last.
FIRST, SECOND, LAST = 4, 8, 12
ROWS = 7
CPU = torch.device("cpu")


def batches(backend: Backend, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
    mine = rank_entries(ROWS, ROWS, backend.rank, backend.world)
    for step in range(start, stop):
        batch = small_batch(small_schema(), ROWS, seed=step)
        batch = replace(batch, uid=batch.uid + ROWS * step, epoch=torch.full((ROWS,), step // 5))
        yield step, batch.rows(mine.start, mine.stop)


def state_of(folder: Path, step: int) -> WholeTensors:
    return WholeTensors((path.read_bytes() for path in sorted((folder / str(step)).iterdir())), str(folder))


def train(name: str, backend: Backend, start: tuple[Path, int] | None, stop: int, out: Path) -> list[float]:
    """Trains up to `stop`; every rank leaves its part of the steps FIRST, SECOND and LAST. start: a state, and its step."""
    engine, files = backend.start(new_model(FUSION[name]), OptimizerConfig())
    state, copy, losses = TrainState(0, EarlyStopping(patience=1)), HostCopy(), []
    if start is not None:
        files.load(state_of(*start))
        state.step = start[1]
    rules = StepRules(lambda batch: batch, lambda batch: pass_keys(batch, 1), lambda step: 2e-3, backend.reduce, 1)
    for report in train_steps(state, engine, batches(backend, state.step, stop), objective(FUSION[name], backend.world), rules):
        losses.append(report.loss)
        if report.step in (FIRST, SECOND, LAST):
            folder = out / str(report.step)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{backend.rank}.safetensors").write_bytes(copy.take(files.fragments()))
    return losses


def each(run: Callable[[str, int], list[float]]) -> dict[str, list[float]]:
    with repeatable(1, CPU):
        return {f"{name}-{stage}": run(name, stage) for name in MODELS for stage in STAGES}


def ranks_of(stage: int) -> DeepSpeedRanks:
    return DeepSpeedRanks(DeepSpeedConfig.model_validate({"zero_stage": stage}), CPU)


def two_ranks(rank: int, world: int, out: Path) -> None:
    """Past where one process will take over, and that again from there."""

    def run(name: str, stage: int) -> list[float]:
        through, continued = out / "two" / f"{name}-{stage}", out / "continued" / f"{name}-{stage}"
        losses = train(name, ranks_of(stage), None, SECOND, through)
        assert train(name, ranks_of(stage), (through, FIRST), SECOND, continued) == losses[FIRST:]
        return losses[:FIRST]

    found = each(run)
    if rank == 0:
        (out / "two.json").write_text(json.dumps(found))


def three_ranks(rank: int, world: int, out: Path) -> None:
    """Goes on from what one process left; with another stage than the two ranks had."""

    def run(name: str, stage: int) -> list[float]:
        start = out / "one" / f"{name}-{stage}", SECOND
        return train(name, ranks_of((stage + 1) % len(STAGES)), start, LAST, out / "three" / f"{name}-{stage}")

    found = each(run)
    if rank == 0:
        (out / "three.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    run_on_ranks(two_ranks, 2, folder)

    def go_on(name: str, stage: int) -> list[float]:
        start = folder / "two" / f"{name}-{stage}", FIRST
        return train(name, OneProcess(), start, SECOND, folder / "one" / f"{name}-{stage}")

    (folder / "one.json").write_text(json.dumps(each(go_on)))
    run_on_ranks(three_ranks, 3, folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with repeatable(1, CPU):
        return {name: train(name, OneProcess(), None, LAST, folder / name) for name in MODELS}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_two_then_one_then_three_ranks_give_the_losses_of_one_process(
    out: Path, undisturbed: dict[str, list[float]], model: str, stage: int
) -> None:
    two, one, three = (json.loads((out / f"{part}.json").read_text())[f"{model}-{stage}"] for part in ("two", "one", "three"))
    assert [*two, *one, *three] == pytest.approx(undisturbed[model], rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_a_continued_run_leaves_the_same_bits(out: Path, model: str, stage: int) -> None:
    """Its losses are compared on the ranks."""
    for rank in range(2):
        left, right = (out / part / f"{model}-{stage}" / str(SECOND) / f"{rank}.safetensors" for part in ("two", "continued"))
        assert left.read_bytes() == right.read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_writes_its_share(out: Path, stage: int) -> None:
    """Nearly: under ZeRO 3 a parameter smaller than a part of it per rank is the first ranks'."""
    for world, part, step in ((2, "two", FIRST), (3, "three", LAST)):
        sizes = [path.stat().st_size for path in (out / part / f"draf-{stage}" / str(step)).iterdir()]
        assert len(sizes) == world
        assert max(sizes) < 1.5 * min(sizes)
