"""MDA as re-derived in spec 4.3: its weights, its closed forms, its size, and that corruption moves the weights.

There is no reference to compare with: the paper's body could not be read.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from planted_tables import NAMES, TABLES, corrupt, planted_batch, train
from planted_tables import SCHEMA as PLANTED
from torch import Tensor, nn

from draf_dist.models.build import build_model
from draf_dist.models.card import model_card
from draf_dist.models.fusion.mda import Mda, MdaConfig, modal_weights
from draf_dist.models.fusion.mean import MeanConfig, MeanFusion
from draf_dist.models.reliability import relative_entropy

SCHEMA = small_schema()
BATCH = small_batch(SCHEMA)
KEYS = pass_keys(BATCH)


def mda(schema: Any = SCHEMA, **options: Any) -> Mda:
    model = build_model(MdaConfig(**({"width": 8, "encoders": SMALL_ENCODERS} | options)), schema, seed=0)
    assert isinstance(model, Mda)
    return model


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(queries: Tensor, keys: Tensor, present: Tensor) -> list[float]:
    """The weights of one study from loops over numbers."""
    there = [m for m in range(len(present)) if present[m]]
    weights = [0.0] * len(present)
    for m in there:
        scores = [float(np.dot(queries[m], keys[k])) / math.sqrt(queries.shape[1]) for k in there]
        total = sum(math.exp(score) for score in scores)
        for k, score in zip(there, scores, strict=True):
            weights[k] += math.exp(score) / total / len(there)
    return weights


def test_weights_are_those_of_the_equations() -> None:
    queries, keys = drawn(2, 8, 3, 5), drawn(2, 8, 3, 5, seed=1)
    found = modal_weights(queries, keys, BATCH.present)
    expected = [[by_hand(queries[s, b].numpy(), keys[s, b].numpy(), BATCH.present[b]) for b in range(8)] for s in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_weights_are_a_distribution_over_present_modalities() -> None:
    found = modal_weights(5 * drawn(8, 3, 5), 5 * drawn(8, 3, 5, seed=1), BATCH.present)
    torch.testing.assert_close(found.sum(1), torch.ones(8, dtype=torch.float64))
    assert (found >= 0).all()
    assert (found[~BATCH.present] == 0).all()


def test_weights_follow_the_modalities_when_these_change_places() -> None:
    queries, keys, order = drawn(8, 3, 5), drawn(8, 3, 5, seed=1), [2, 0, 1]
    found = modal_weights(queries[:, order], keys[:, order], BATCH.present[:, order])
    torch.testing.assert_close(found, modal_weights(queries, keys, BATCH.present)[:, order])


def test_without_queries_it_is_mean_fusion_of_the_values() -> None:
    model, mean = mda(), build_model(MeanConfig(width=8, encoders=SMALL_ENCODERS), SCHEMA, seed=0)
    assert isinstance(mean, MeanFusion)
    mean.load_state_dict({name: value for name, value in model.state_dict().items() if name in mean.state_dict()})
    with torch.no_grad():
        model.queries.weight.zero_()
        nn.init.eye_(model.values.weight)
    found, expected = model(BATCH, KEYS), mean(BATCH, KEYS)
    torch.testing.assert_close(found.reliability, expected.reliability)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.signals["attention_entropy"], torch.ones(8))


def test_the_fused_vector_is_linear_in_the_features_once_weights_are_given() -> None:
    model = mda()
    first, second = drawn(2, 8, 3, 8).float(), drawn(2, 8, 3, 8, seed=1).float()
    weights = modal_weights(first, second, BATCH.present)
    together = model.fused(2 * first - 3 * second, weights)
    torch.testing.assert_close(together, 2 * model.fused(first, weights) - 3 * model.fused(second, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [16, 64, 128])
def test_it_has_three_squares_of_the_width_more_than_mean_fusion(width: int) -> None:
    with torch.device("meta"):
        with_it, without = Mda(MdaConfig(width=width), SCHEMA), MeanFusion(MeanConfig(width=width), SCHEMA)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (with_it, without)]
    assert counts[0] - counts[1] == 3 * width**2


def test_relative_entropy_is_one_for_equal_weights_and_zero_for_one_alone() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.25, 0.75, 0.0]])
    present = torch.tensor([[True, True, False], [True, True, True], [False, False, True], [True, True, False]])
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    torch.testing.assert_close(relative_entropy(weights, present), torch.tensor([1.0, 0.0, 1.0, quarter]))


def test_tables_call_it_re_derived() -> None:
    assert model_card(MdaConfig(), SCHEMA, 1).startswith("# MDA (re-derived): ")


@pytest.fixture(scope="module")
def trained() -> Mda:
    """Every table is noise in three rows of ten, so that there is something to learn from."""
    model = mda(PLANTED, width=16, encoders=TABLES)
    train(model, (0.5, 0.5, 0.5), steps=120, corruption=0.3, rate=1e-2)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_of_a_corrupted_modality_falls_and_those_of_the_others_rise(trained: Mda, name: str) -> None:
    clean = planted_batch((0.5, 0.5, 0.5), rows=500, seed=10_000)
    with torch.no_grad():
        before, after = (trained(batch, pass_keys(batch)).reliability for batch in (clean, corrupt(clean, name)))
    change = (after - before).mean(0)
    for axis, other in enumerate(NAMES):
        assert (change[axis] < -0.05) if other == name else (change[axis] > 0.0)
