"""Contrastive pre-training does not depend on how the global batch is cut: into ranks, into micro-batches, by which engine.

All cases of one world size share one set of processes: starting them costs more than training.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from forked_ranks import run_on_ranks
from model_inputs import pass_keys, small_batch, small_schema
from small_runs import small_release
from torch import Tensor, nn

from draf_dist.data.order import rank_entries
from draf_dist.data.release import open_release
from draf_dist.losses.gather import AllGather, Gather, one_process
from draf_dist.models.encoders import Image2dConfig
from draf_dist.objectives.pretrain import build_network
from draf_dist.objectives.pretrain_simclr import SimclrConfig
from draf_dist.schema.batch import Batch, Term
from draf_dist.training.backend import Backend
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.engine import Engine
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.loop import CoupledObjective, Objective, StepReport, StepRules, train_steps
from draf_dist.training.pretrain import build_pretraining
from draf_dist.training.pretrain_job import PretrainJob
from draf_dist.training.repeatable import repeatable
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import TrainState
from draf_dist.training.torch_engine import OneProcess, TorchEngine

WORLDS, ACCUMULATIONS = (1, 2, 3), (1, 4)
ROWS, STEPS = 11, 6
CONFIG = SimclrConfig(modality="cxr")
ENCODER = Image2dConfig(widths=(4, 8), groups=2)


def global_batch(step: int) -> Batch:
    """Eleven rows, some without an image. A uid is drawn twice, and the last batch has three rows of padding."""
    batch = small_batch(small_schema(), ROWS, seed=step)
    weight = torch.ones(ROWS)
    weight[ROWS - (3 if step == STEPS - 1 else 0) :] = 0
    uid = torch.where(weight > 0, batch.uid + ROWS * step, -1)
    uid[6] = uid[1]
    present = batch.present.clone()
    present[1] = present[6] = True
    epoch = torch.full((ROWS,), step // 4)
    epoch[6] += 1
    return replace(batch, weight=weight, uid=uid, epoch=epoch, present=present, site=torch.arange(ROWS) % 2)


def batches(rank: int, world: int) -> list[tuple[int, Batch]]:
    mine = rank_entries(ROWS, ROWS, rank, world)
    return [(step, global_batch(step).rows(mine.start, mine.stop)) for step in range(STEPS)]


def rules(reduce: Callable[[Tensor], Tensor], accumulation: int) -> StepRules:
    return StepRules(lambda batch: batch, lambda batch: pass_keys(batch, 1), lambda step: 2e-3, reduce, accumulation)


@dataclass
class Recorded:
    """An engine, and the gradient of the global batch as its `step` finds it, on every rank."""

    engine: Engine
    whole_gradient: Callable[[nn.Parameter], Tensor]
    gradients: list[Tensor]
    num_backward: int = 0

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def backward(self, loss: Tensor) -> None:
        self.num_backward += 1
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        found = [self.whole_gradient(parameter).detach().float().flatten() for parameter in self.module.parameters()]
        self.gradients.append(torch.cat(found))
        return self.engine.step(learning_rate)


class SummingEngine(TorchEngine):
    """Plain torch on every rank, with gradients summed over ranks after the last backward."""

    def sum_over_ranks(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        return parameter.grad


@dataclass(frozen=True)
class Run:
    losses: list[float]
    terms: list[dict[str, float]]
    gradients: list[Tensor]
    num_backward: int


def train(engine: Recorded, rank: int, world: int, objective: Objective | CoupledObjective, step_rules: StepRules) -> Run:
    state = TrainState(0, EarlyStopping(patience=1))
    reports: list[StepReport] = list(train_steps(state, engine, batches(rank, world), objective, step_rules))
    return Run([r.loss for r in reports], [r.terms for r in reports], engine.gradients, engine.num_backward)


def new_network() -> nn.Module:
    return build_network(CONFIG, small_schema(), ENCODER, width=16, seed=3)


def of_parameter(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def in_one_process(objective: Objective | CoupledObjective, accumulation: int) -> Run:
    engine, _ = OneProcess().start(new_network(), OptimizerConfig())
    return train(Recorded(engine, of_parameter, []), 0, 1, objective, rules(lambda values: values, accumulation))


def with_torch(rank: int, world: int, accumulation: int, gather: Gather) -> Run:
    network = new_network()
    engine = SummingEngine(network, torch.optim.AdamW(network.parameters(), weight_decay=0.01), clip_norm=None)

    def reduce(values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    recorded = Recorded(engine, engine.sum_over_ranks, [])
    return train(recorded, rank, world, CONFIG.build(0, gather), rules(reduce, accumulation))


def with_deepspeed(rank: int, world: int, accumulation: int, gather: Gather) -> Run:
    backend = DeepSpeedRanks(DeepSpeedConfig(zero_stage=1, accumulation=accumulation), torch.device("cpu"))
    engine, _ = backend.start(new_network(), OptimizerConfig())
    # DeepSpeed's gradient is a mean over ranks and micro-batches of losses that were multiplied by their number: the sum.
    recorded = Recorded(engine, lambda parameter: safe_get_full_grad(parameter), [])
    return train(recorded, rank, world, CONFIG.build(0, gather), rules(backend.reduce, accumulation))


ENGINES = {"torch": with_torch, "deepspeed": with_deepspeed}


def validation(job_json: str, backend: Backend) -> dict[str, float]:
    job = PretrainJob.model_validate_json(job_json)
    stage = build_pretraining(job, open_release(job.release), backend)
    return stage.validate(stage.model, backend, stage.validation(backend))


def run_rank(rank: int, world: int, jobs: dict[str, str], out: Path) -> None:
    with repeatable(1, torch.device("cpu")):
        for engine, run in ENGINES.items():
            for accumulation in ACCUMULATIONS:
                found = run(rank, world, accumulation, AllGather())
                torch.save(vars(found), out / f"{engine}-{world}-{accumulation}-{rank}.pt")
        for kind, job_json in jobs.items():
            numbers = validation(job_json, DeepSpeedRanks(DeepSpeedConfig(), torch.device("cpu")))
            (out / f"{kind}-{world}-{rank}.json").write_text(json.dumps(numbers))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A pre-training job of every kind, as JSON. Seven rows do not go evenly into ranks, nor the split into sevens."""
    release = small_release(tmp_path_factory.mktemp("data"), num_subjects=60, seed=1)
    tree = {"name": "pre", "release": release, "width": 8, "batch_size": 7}
    objectives = [{"kind": "simclr", "modality": "cxr"}, {"kind": "masked_values", "modality": "vitals"}]
    made = [PretrainJob.model_validate({**tree, "objective": objective}) for objective in objectives]
    return {job.objective.kind: job.model_dump_json() for job in made}


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, jobs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """How many there were, and where the runs of each are."""
    world, out = request.param, tmp_path_factory.mktemp("out")
    run_on_ranks(run_rank, world, jobs, out)
    return world, out


@pytest.fixture(scope="module")
def alone() -> Run:
    return in_one_process(CONFIG.build(0, one_process), 1)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_ranks_and_micro_batches_give_the_losses_and_gradients_of_one_process(
    ranks: tuple[int, Path], accumulation: int, engine: str, alone: Run
) -> None:
    world, out = ranks
    for rank in range(world):
        loaded: dict[str, Any] = torch.load(out / f"{engine}-{world}-{accumulation}-{rank}.pt")
        found = Run(**loaded)
        assert found.num_backward == STEPS * accumulation
        assert found.losses == pytest.approx(alone.losses, rel=1e-6)
        for ours, theirs in zip(found.terms, alone.terms, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        for step, (ours_, theirs_) in enumerate(zip(found.gradients, alone.gradients, strict=True)):
            assert difference(ours_, theirs_) < 1e-5, step


@pytest.mark.parametrize("kind", ["simclr", "masked_values"])
def test_validation_gives_every_rank_the_same_numbers_and_those_of_one_process(
    ranks: tuple[int, Path], jobs: dict[str, str], kind: str
) -> None:
    world, out = ranks
    with repeatable(1, torch.device("cpu")):
        expected = validation(jobs[kind], OneProcess())
    found = [json.loads((out / f"{kind}-{world}-{rank}.json").read_text()) for rank in range(world)]
    assert all(one == found[0] for one in found)
    assert found[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulation", [2, 4, 13])
def test_micro_batches_in_one_process_change_nothing_not_even_those_without_a_row(accumulation: int, alone: Run) -> None:
    found = in_one_process(CONFIG.build(0, one_process), accumulation)
    assert found.losses == pytest.approx(alone.losses, rel=1e-6)
    assert max(difference(a, b) for a, b in zip(found.gradients, alone.gradients, strict=True)) < 1e-5


def test_adding_up_losses_of_micro_batches_instead_gives_another_loss_and_gradient(alone: Run) -> None:
    """What gradient caching is for: the rows of one micro-batch are no negatives of those of another."""
    objective = CONFIG.build(0, one_process)

    def as_a_sum_over_rows(model: nn.Module, batch: Batch, keys: Tensor) -> dict[str, Term]:
        return objective(model, batch, keys)

    naive = in_one_process(as_a_sum_over_rows, 4)
    assert difference(naive.gradients[0], alone.gradients[0]) > 0.3
    assert abs(naive.losses[0] - alone.losses[0]) / alone.losses[0] > 0.1
    assert difference(in_one_process(as_a_sum_over_rows, 1).gradients[0], alone.gradients[0]) < 1e-6


def test_the_batches_are_cut_unequally_and_hold_what_a_mixture_can_draw() -> None:
    assert {len(range(ROWS)[rank_entries(ROWS, ROWS, rank, 3)]) for rank in range(3)} == {3, 4}
    assert [int((global_batch(step).weight > 0).sum()) for step in range(STEPS)] == [11] * (STEPS - 1) + [8]
    uid = global_batch(0).uid.tolist()
    assert len(set(uid)) == ROWS - 1
    assert not global_batch(0).present[:, 0].all()
