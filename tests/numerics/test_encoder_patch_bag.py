"""Gated attention over a bag: its closed form, what the order of patches may change (nothing), and what it finds."""

import math

import pytest
import torch
from model_inputs import variables
from torch import Tensor, nn
from torch.nn import functional

from draf_dist import noise
from draf_dist.models.encoders.patch_bag import GatedAttention, PatchBag, PatchBagConfig
from draf_dist.models.mc import name_streams
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.modality import SeriesSpec

PATCHES, FEATURES = 12, 6


def encoder() -> PatchBag:
    torch.manual_seed(0)
    config = PatchBagConfig(hidden=16, attention=8)
    built = config.build(SeriesSpec(name="slide", variables=variables(FEATURES), num_steps=PATCHES, step_h=1.0), 8)
    name_streams(built)
    return built


def bag(values: Tensor, length: int = PATCHES) -> SeriesInput:
    return SeriesInput(values, torch.ones_like(values, dtype=torch.bool), torch.full((len(values),), length))


def patches(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, PATCHES, FEATURES, generator=torch.Generator().manual_seed(seed))


def keys(passes: int, rows: int, first: int = 0) -> Tensor:
    return noise.sample_keys(0, "model", None, torch.arange(first, first + rows), passes)


def test_weights_are_those_of_the_closed_form() -> None:
    attention = GatedAttention(1, 1)
    with torch.no_grad():
        for parameter, value in zip(attention.parameters(), (1.0, 0.0, 2.0, 0.0, 3.0), strict=True):
            parameter.fill_(value)
    found = attention(torch.tensor([[[0.5], [-1.0], [9.0]]]), torch.tensor([[True, True, False]]))
    scores = [3 * math.tanh(x) / (1 + math.exp(-2 * x)) for x in (0.5, -1.0)]
    total = sum(map(math.exp, scores))
    torch.testing.assert_close(found, torch.tensor([[math.exp(scores[0]) / total, math.exp(scores[1]) / total, 0.0]]))


def test_the_order_of_patches_changes_no_pass() -> None:
    model, values = encoder(), patches(5)
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(3))
    shuffled = model(bag(values[:, order]), keys(4, 5))
    features = model(bag(values), keys(4, 5))
    assert not torch.equal(features[0], features[1])
    torch.testing.assert_close(features, shuffled, atol=1e-5, rtol=1e-5)


def test_every_patch_twice_is_the_same_bag() -> None:
    model, values = encoder(), patches(5)
    torch.testing.assert_close(
        model(bag(values), keys(3, 5)),
        model(bag(values.repeat(1, 2, 1), 2 * PATCHES), keys(3, 5)),
        atol=1e-5,
        rtol=1e-5,
    )


def test_an_empty_bag_has_the_features_of_nothing() -> None:
    model, values = encoder(), patches(5)
    features = model(bag(values, length=0), keys(3, 5))
    expected = model.projection.norm(model.projection.linear.bias)
    torch.testing.assert_close(features, expected.expand(3, 5, -1))


def test_a_patch_of_which_nothing_was_observed_does_not_count() -> None:
    model, values = encoder(), patches(5)
    observed = torch.ones_like(values, dtype=torch.bool)
    observed[:, -4:] = False
    partly = SeriesInput(torch.where(observed, values, 0.0), observed, torch.full((5,), PATCHES))
    shorter = bag(values[:, :-4], PATCHES - 4)
    torch.testing.assert_close(model(partly, keys(2, 5)), model(shorter, keys(2, 5)), atol=1e-6, rtol=1e-6)


def planted(rows: int, seed: int) -> tuple[SeriesInput, Tensor, Tensor]:
    """Bags of noise; in half of them one patch, at any place, has 3 more in its first two features."""
    generator = torch.Generator().manual_seed(seed)
    values, place = patches(rows, seed), torch.randint(0, PATCHES, (rows,), generator=generator)
    label = torch.arange(rows) % 2
    values[torch.arange(rows), place, :2] += 3.0 * label[:, None]
    return bag(values), label, place


@pytest.mark.parametrize("seed", [0, 1])
def test_attention_finds_the_patch_that_makes_the_label(seed: int) -> None:
    model = encoder()
    head = nn.Linear(8, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=5e-3)
    train, label, _ = planted(200, 10 + seed)
    for step in range(150):
        logits = head(model(train, keys(1, 200, 1000 * step)))[0]
        optimizer.zero_grad()
        functional.cross_entropy(logits, label).backward()
        optimizer.step()
    test, label, place = planted(400, 20 + seed)
    weights: list[Tensor] = []
    model.attention.register_forward_hook(lambda _module, _inputs, output: weights.append(output))
    with torch.no_grad():
        right = head(model(test, keys(10, 400))).mean(0).argmax(-1) == label
    of_planted = weights[0].mean(0)[torch.arange(400), place][label == 1]
    assert right.float().mean() > 0.85
    # Of 12 patches: a twelfth each if attention knew nothing.
    assert of_planted.mean() > 0.4
