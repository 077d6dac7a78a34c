"""Cox's loss looks at all rows of a step: cut into micro-batches it is the same, also of models that draw in training alone."""

from dataclasses import replace

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema

from draf_dist.models.build import build_model
from draf_dist.models.fusion import FusionConfig
from draf_dist.models.fusion.early import EarlyConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.objectives.cox import CoxObjectiveConfig
from draf_dist.schema.batch import Batch, SurvivalTarget
from draf_dist.schema.label import SurvivalSpec
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.loop import StepReport, StepRules, train_steps
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import TrainState
from draf_dist.training.torch_engine import OneProcess

SCHEMA = small_schema().model_copy(update={"label": SurvivalSpec(name="death", edges=(1.0, 2.0))})
MODELS: dict[str, FusionConfig] = {
    "dropout in training alone": EarlyConfig(hidden=(16, 8), image_side=6),
    "dropout always": MeanConfig(width=8, encoders=SMALL_ENCODERS),
}


def batch(seed: int) -> Batch:
    drawn = torch.Generator().manual_seed(seed)
    time = 3 * torch.rand(12, generator=drawn)
    target = SurvivalTarget(time, torch.rand(12, generator=drawn) < 0.7, time.long(), torch.ones(12, dtype=torch.bool))
    return replace(small_batch(small_schema(), rows=12, seed=seed), target=target)


def trained(config: FusionConfig, accumulation: int) -> list[StepReport]:
    engine, _ = OneProcess().start(build_model(config, SCHEMA, seed=0), OptimizerConfig())
    rules = StepRules(lambda rows: rows, lambda rows: pass_keys(rows, 2), lambda step: 1e-2, accumulation=accumulation)
    batches = [(step, batch(step)) for step in range(3)]
    return list(train_steps(TrainState(0, EarlyStopping(patience=1)), engine, batches, CoxObjectiveConfig().build(SCHEMA), rules))


@pytest.mark.parametrize("accumulation", [2, 3])
@pytest.mark.parametrize("model", MODELS)
def test_micro_batches_change_neither_losses_nor_gradients(model: str, accumulation: int) -> None:
    whole, parts = trained(MODELS[model], 1), trained(MODELS[model], accumulation)
    for one, other in zip(whole, parts, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-6)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)
