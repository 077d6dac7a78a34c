"""What the fusions without reliability do with planted truth: mean, feature concatenation, late mean."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_inputs import pass_keys
from planted_tables import NAMES, SCHEMA, TABLES, accuracy, corrupt, planted_batch, table, train, train_on
from torch import Tensor, nn

from draf_dist.models.build import build_model
from draf_dist.models.fusion.concat import ConcatConfig
from draf_dist.models.fusion.late_mean import LateMeanConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.schema.batch import Batch, ClassTarget

TOGETHER = (MeanConfig(width=16, encoders=TABLES), ConcatConfig(width=16, encoders=TABLES))
LATE = LateMeanConfig(width=16, encoders=TABLES)
SHIFT = 0.4
CLEAN = planted_batch((SHIFT,) * 3, rows=2000, seed=10_000)


def trained(config: Any, *shifts: float) -> nn.Module:
    model = build_model(config, SCHEMA, seed=0)
    train(model, shifts, steps=150, rate=1e-2)
    return model


def exact(batch: Batch, shift: float, count: int) -> Tensor:
    """P(yes) of the first tables: of normal values with means +-shift the log odds are 2 shift sum x."""
    values = torch.cat([batch.inputs[name].values.flatten(1) for name in NAMES[:count]], dim=1)
    return (2 * shift * values.sum(1)).sigmoid()


@torch.no_grad()
def probability(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch, pass_keys(batch, 8)).logits.softmax(-1).mean(0)[:, 1]


def only(batch: Batch, *names: str) -> Batch:
    kept = torch.tensor([name in names for name in NAMES])
    return replace(batch, present=batch.present & kept)


def opposed(rows: int, seed: int) -> Batch:
    """Yes where two tables are of one sign: neither says anything alone, and the third is silent."""
    batch = planted_batch((0, 0, 0), rows=rows, seed=seed)
    signs = 2.0 * torch.randint(0, 2, (rows, 2), generator=torch.Generator().manual_seed(seed)) - 1
    moved = {name: table(batch.inputs[name].values.squeeze(1) + signs[:, m : m + 1]) for m, name in enumerate(NAMES[:2])}
    target = ClassTarget((signs.prod(1) > 0).long(), torch.ones(rows, dtype=torch.bool))
    return replace(batch, inputs=batch.inputs | moved, target=target)


@pytest.mark.parametrize("config", TOGETHER, ids=lambda config: config.kind)
def test_heads_over_all_features_learn_the_posterior_of_all_tables(config: Any) -> None:
    found = probability(trained(config, SHIFT, SHIFT, SHIFT), CLEAN)
    assert (found - exact(CLEAN, SHIFT, 3)).abs().mean() < 0.05


@pytest.mark.parametrize("config", TOGETHER, ids=lambda config: config.kind)
def test_noise_is_lost_only_where_it_hits_what_says_something(config: Any) -> None:
    """There is no weight that could fall: what the noise hits is believed."""
    model = trained(config, 1.0, 0.0, 0.0)
    clean = planted_batch((1.0, 0.0, 0.0), rows=1000, seed=10_000)
    whole = accuracy(model, clean)
    assert whole > 0.97
    assert accuracy(model, corrupt(clean, NAMES[1])) > whole - 0.03
    noisy = corrupt(clean, NAMES[0], sigma=10)
    assert accuracy(model, noisy) < whole - 0.2
    with torch.no_grad():
        reliability = model(noisy, pass_keys(noisy)).reliability
    torch.testing.assert_close(reliability, torch.full_like(reliability, 1 / 3))


def test_late_mean_learns_the_posterior_of_each_table_and_is_less_certain_than_that_of_all() -> None:
    model = trained(LATE, SHIFT, SHIFT, SHIFT)
    alone = probability(model, only(CLEAN, NAMES[0]))
    assert (alone - exact(CLEAN, SHIFT, 1)).abs().mean() < 0.07
    found, known = probability(model, CLEAN), exact(CLEAN, SHIFT, 3)
    assert (found - 0.5).abs().mean() < (known - 0.5).abs().mean() - 0.05
    # Less certain, but of the same opinion: averaging probabilities costs calibration here and hardly any decisions.
    assert ((found > 0.5) == (known > 0.5)).float().mean() > 0.95


@pytest.mark.parametrize("config", [*TOGETHER, LATE], ids=lambda config: config.kind)
def test_only_fusions_before_the_decision_learn_what_two_tables_say_together(config: Any) -> None:
    model = build_model(config, SCHEMA, seed=0)
    train_on(model, lambda step: opposed(128, step), steps=200, rate=1e-2)
    right = accuracy(model, opposed(1000, 10_000))
    assert abs(right - 0.5) < 0.07 if config is LATE else right > 0.9
