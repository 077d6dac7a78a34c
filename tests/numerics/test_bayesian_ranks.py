"""Steps of the Bayesian stage over ranks, with DeepSpeed too, are those of one process (rule D8)."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bayesian_inputs import MASK, disc_batch, model_keys, schema_of
from forked_ranks import run_on_ranks
from torch import Tensor

from draf_dist.models.segmentation import BayesianUnetConfig
from draf_dist.objectives.adversarial import AdversarialConfig, Reduce
from draf_dist.objectives.bayesian import BayesianObjectiveConfig
from draf_dist.training.backend import Backend
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.loop import StepRules, train_steps
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import TrainState
from draf_dist.training.torch_engine import OneProcess

SCHEMA = schema_of(MASK, 2, 12, annotated=True)
CUT = (1, 5)
STAGES = (1, 3)
Step = dict[str, Tensor]


def one_step(first: int, stop: int, reduce: Reduce, mean_over: Reduce) -> Step:
    """Every term's numerator and weight, and the gradient, of some rows. reduce: over ranks; mean_over: that of the objective."""
    torch.manual_seed(0)
    model = BayesianUnetConfig(widths=(4, 6), groups=2).build(SCHEMA)
    config = BayesianObjectiveConfig(
        estimator="weights", adversarial=AdversarialConfig(attack="fgsm", samples=1), clinical_map="expert", body_mask="body"
    )
    objective = config.build(modality="scan", num_train=30, num_steps=10, seed=1, reduce=mean_over)
    batch = disc_batch(SCHEMA, 6)
    keys = model_keys(batch)
    terms = objective.at(7)(model, batch.rows(first, stop), keys[:, first:stop])
    found = {name: reduce(torch.stack([term.numerator.detach(), term.weight]).double()) for name, term in terms.items()}
    loss = sum((term.scale * term.numerator / found[name][1].float() for name, term in terms.items()), torch.zeros(()))
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return found | {"gradient": reduce(gradient.double())}


def summed(values: Tensor) -> Tensor:
    total = values.to(torch.float64, copy=True)
    dist.all_reduce(total)
    return total


def alone(values: Tensor) -> Tensor:
    return values


def trained(backend: Backend, rows: slice) -> Tensor:
    """Loss and norm of the gradient of some steps with an engine, f64 (steps, 2)."""
    torch.manual_seed(0)
    model = BayesianUnetConfig(widths=(4, 6), groups=2).build(SCHEMA)
    config = BayesianObjectiveConfig(adversarial=AdversarialConfig(steps=2, samples=2), clinical_map="expert")
    objective = config.build(modality="scan", num_train=30, num_steps=10, seed=1, reduce=backend.reduce)
    engine, _ = backend.start(model, OptimizerConfig(weight_decay=0.0))
    rules = StepRules(lambda batch: batch, model_keys, lambda _: 1e-3, reduce=backend.reduce)
    state = TrainState(0, EarlyStopping(patience=1))
    reports = []
    for step in range(3):
        batch = disc_batch(SCHEMA, 6, seed=step).map(lambda tensor: tensor[rows])
        reports += list(train_steps(state, engine, [(step, batch)], objective.at(step), rules))
    return torch.tensor([(report.loss, report.gradient_norm) for report in reports], dtype=torch.float64)


def with_deepspeed(stage: int, rows: slice) -> Tensor:
    """Of one rank. Every parameter is partitioned at stage 3, however small."""
    from draf_dist.training import deepspeed_engine
    from draf_dist.training.deepspeed_config import DeepSpeedConfig

    deepspeed_engine.WHOLE_BELOW = 0
    config = DeepSpeedConfig(zero_stage=stage, activation_checkpointing=stage == 3)
    return trained(deepspeed_engine.DeepSpeedRanks(config, torch.device("cpu")), rows)


def run_rank(rank: int, world: int, folder: str) -> None:
    first, stop = (0, CUT[0]) if rank == 0 else (CUT[0], sum(CUT))
    results: dict[str, Any] = {
        name: one_step(first, stop, summed, mean_over) for name, mean_over in (("global", summed), ("local", alone))
    }
    results |= {f"zero {stage}": with_deepspeed(stage, slice(first, stop)) for stage in STAGES}
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")


@pytest.fixture(scope="module")
def over_ranks() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(run_rank, len(CUT), folder)
        loaded: dict[str, Any] = torch.load(Path(folder, "results.pt"))
    return loaded


@pytest.fixture(scope="module")
def one_process() -> Step:
    torch.set_num_threads(1)
    return one_step(0, sum(CUT), alone, alone)


def test_every_term_is_that_of_one_process(over_ranks: dict[str, Any], one_process: Step) -> None:
    found = over_ranks["global"]
    assert found.keys() == one_process.keys()
    for name in found.keys() - {"gradient"}:
        # What is attacked may differ in a pixel whose gradient is as good as 0.
        tolerance = 1e-3 if name.startswith("adversarial_") else 1e-5
        torch.testing.assert_close(
            found[name], one_process[name].double(), rtol=tolerance, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_divergence_is_no_larger_on_two_ranks(over_ranks: dict[str, Any], one_process: Step) -> None:
    numerator, weight = over_ranks["global"]["kl"]
    expected = one_process["kl"][0] / one_process["kl"][1]
    assert (numerator / weight).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_gradient_is_that_of_one_process_and_needs_the_global_mean_uncertainty(
    over_ranks: dict[str, Any], one_process: Step
) -> None:
    expected = one_process["gradient"]
    gradients = {name: over_ranks[name]["gradient"] for name in ("global", "local")}
    error = {name: ((found - expected).norm() / expected.norm()).item() for name, found in gradients.items()}
    assert error["global"] < 1e-4
    assert error["local"] > 10 * error["global"]


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_gives_the_losses_and_gradients_of_one_process(stage: int, over_ranks: dict[str, Any]) -> None:
    """An attack takes gradients within a step, and a divergence looks at parameters that ZeRO 3 has cut up."""
    expected = trained(OneProcess(), slice(0, 6))
    torch.testing.assert_close(over_ranks[f"zero {stage}"], expected, rtol=1e-5, atol=0)
