"""AUM on several ranks: what its modality nodes make of a batch that is cut (rule D4), and its contrastive pair over all of it.

All cases of one world size share one set of processes: starting them costs more than computing.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_on_ranks
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from torch import Tensor

from draf_dist.losses.gather import AllGather, Gather, one_process
from draf_dist.models.build import build_model
from draf_dist.models.fusion.aum import AumConfig
from draf_dist.objectives.aum import AumObjectiveConfig
from draf_dist.schema.batch import Batch
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.engine import Engine
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.loop import StepRules, train_steps
from draf_dist.training.repeatable import repeatable
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import TrainState
from draf_dist.training.torch_engine import OneProcess

SCHEMA = small_schema()
# Rows of each rank by world size: unequal cuts, and one rank that has none.
CUTS = {1: (9,), 2: (4, 5), 3: (5, 0, 4)}
NODES = ("none", "sync", "batch")
READINGS: dict[str, dict[str, Any]] = {
    "literal": {},
    "precise": {"attention": "precision", "missing": "high_var", "var_rule": "mixture", "relu_moments": "exact"},
}
CASES = [(nodes, reading) for nodes in NODES for reading in READINGS]
STEPS = 3


def new_model(nodes: str, reading: str) -> torch.nn.Module:
    """With three layers, and with variances that differ."""
    options = {"width": 8, "encoders": SMALL_ENCODERS, "num_layers": 3, "warm_epochs": 0, "modality_node_update": nodes}
    model = build_model(AumConfig.model_validate(options | READINGS[reading]), SCHEMA, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.gaussians.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def global_batch(seed: int = 0) -> Batch:
    """Nine rows, one of them padding, one uid twice."""
    batch = small_batch(SCHEMA, rows=9, seed=seed)
    uid = torch.where(torch.arange(9) == 7, batch.uid[1], batch.uid)
    epoch = (torch.arange(9) == 7).long()
    return replace(batch, uid=torch.where(torch.arange(9) == 8, -1, uid), epoch=epoch, weight=(torch.arange(9) < 8).float())


def in_doubles(batch: Batch) -> Batch:
    return batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def keys_of(batch: Batch) -> Tensor:
    return pass_keys(batch, 2)


def cut(batch: Batch, rank: int, world: int) -> Batch:
    start = sum(CUTS[world][:rank])
    return batch.rows(start, start + CUTS[world][rank])


def local_sums(nodes: str, reading: str, rank: int, world: int, gather: Gather) -> dict[str, Tensor]:
    """Of every term numerator and weight, and the gradient of its numerator, in f64: to be summed over ranks."""
    model, batch = new_model(nodes, reading).double(), cut(in_doubles(global_batch()), rank, world)
    terms = AumObjectiveConfig().build(SCHEMA, gather)(model, batch, keys_of(batch))
    found = {f"value of {name}": torch.stack([term.numerator, term.weight]).detach() for name, term in terms.items()}
    # Term by term, in the same order on every rank: what each is divided by plays no part.
    for name in (name for name in terms if not name.startswith("signal_")):
        gradients = torch.autograd.grad(
            terms[name].numerator, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found[f"gradient of {name}"] = torch.cat([gradient.flatten() for gradient in gradients])
    return found


def logits_of(nodes: str, reading: str, rank: int, world: int) -> Tensor:
    batch = cut(global_batch(), rank, world)
    with torch.no_grad():
        found: Tensor = new_model(nodes, reading).eval()(batch, keys_of(batch)).logits
    return found


def train(engine: Engine, rank: int, world: int, gather: Gather, reduce: Any, accumulation: int = 1) -> list[float]:
    rules = StepRules(lambda b: b, keys_of, lambda step: 1e-2, reduce, accumulation)
    batches = [(step, cut(global_batch(step), rank, world)) for step in range(STEPS)]
    objective = AumObjectiveConfig().build(SCHEMA, gather)
    return [report.loss for report in train_steps(TrainState(0, EarlyStopping(patience=1)), engine, batches, objective, rules)]


# Collectives of the model's own backward among those of the engine; and gradient caching where no row sees another.
TRAININGS = [("sync", stage, 1) for stage in (1, 2, 3)] + [("none", 1, 3)]


def run_rank(rank: int, world: int, out: str) -> None:
    results: dict[str, Any] = {}
    with repeatable(1, torch.device("cpu")):
        for nodes, reading in CASES:
            sums = local_sums(nodes, reading, rank, world, AllGather())
            for values in sums.values():
                dist.all_reduce(values)
            results[f"sums {nodes} {reading}"] = sums
            results[f"logits {nodes} {reading}"] = logits_of(nodes, reading, rank, world)
        if world == 2:
            for nodes, stage, accumulation in TRAININGS:
                config = DeepSpeedConfig.model_validate({"zero_stage": stage, "accumulation": accumulation})
                backend = DeepSpeedRanks(config, torch.device("cpu"))
                engine, _ = backend.start(new_model(nodes, "precise"), OptimizerConfig())
                losses = train(engine, rank, world, AllGather(), backend.reduce, accumulation)
                results[f"losses {nodes} {stage} {accumulation}"] = losses
    torch.save(results, Path(out, f"{rank}.pt"))


@pytest.fixture(scope="module", params=CUTS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found."""
    out = tmp_path_factory.mktemp("out")
    run_on_ranks(run_rank, request.param, str(out))
    return [torch.load(out / f"{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    with repeatable(1, torch.device("cpu")):
        return {f"{nodes} {reading}": local_sums(nodes, reading, 0, 1, one_process) for nodes, reading in CASES}


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("nodes", ["none", "sync"])
def test_any_number_of_ranks_gives_the_terms_and_gradients_of_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, dict[str, Tensor]], nodes: str, reading: str
) -> None:
    found, expected = ranks[0][f"sums {nodes} {reading}"], alone[f"{nodes} {reading}"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype is torch.float64
        assert difference(found[name], value) < 1e-9, name


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("nodes", NODES)
def test_studies_get_the_same_logits_on_any_number_of_ranks_unless_their_batch_is_the_ranks_own(
    ranks: list[dict[str, Any]], nodes: str, reading: str
) -> None:
    found = torch.cat([each[f"logits {nodes} {reading}"] for each in ranks], 1)
    with repeatable(1, torch.device("cpu")):
        expected = logits_of(nodes, reading, 0, 1)
    apart = float((found - expected)[:, :8].abs().max())
    if nodes == "batch" and len(ranks) > 1:
        assert apart > 1e-5
    else:
        assert apart < 1e-6


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize(("nodes", "stage", "accumulation"), TRAININGS)
def test_training_with_deepspeed_is_that_of_one_process(
    ranks: list[dict[str, Any]], nodes: str, stage: int, accumulation: int
) -> None:
    with repeatable(1, torch.device("cpu")):
        engine, _ = OneProcess().start(new_model(nodes, "precise"), OptimizerConfig())
        expected = train(engine, 0, 1, one_process, lambda values: values)
    for each in ranks:
        assert each[f"losses {nodes} {stage} {accumulation}"] == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == STEPS
