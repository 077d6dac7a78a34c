"""Attention maps and what they are aligned with: O11 and hand-made maps for every term (spec 3.6, 3.8)."""

import math

import pytest
import torch
from torch import Tensor

from draf_dist.losses.alignment import anatomical, clinical_alignment, uncertainty_alignment
from draf_dist.models.spatial_attention import (
    SpatialAttention,
    attention_entropy,
    damped,
    on_grid,
    relative_to_peak,
    spatial_softmax,
)
from draf_dist.schema.batch import Term

ONE = torch.ones(1)
KNOWN = torch.ones(1, dtype=torch.bool)
SPACE = {2: (7, 5), 3: (4, 6, 5)}


def value(term: Term) -> float:
    return (term.numerator / term.weight).item()


def row(*numbers: float) -> Tensor:
    """A map of one row, one place wide."""
    return torch.tensor(numbers, dtype=torch.float32).view(1, -1, 1)


def pyramid(dimensions: int) -> tuple[SpatialAttention, list[Tensor]]:
    torch.manual_seed(1)
    sides = [SPACE[dimensions], tuple(-(-side // 2) for side in SPACE[dimensions])]
    features = [3 * torch.randn(2, width, *space) for width, space in zip((3, 6), sides, strict=True)]
    return SpatialAttention((3, 6), dimensions), features


@pytest.mark.parametrize("dimensions", [2, 3])
def test_maps_and_importances_sum_to_one(dimensions: int) -> None:
    module, features = pyramid(dimensions)
    with torch.no_grad():
        module.importance.copy_(torch.tensor([0.3, -1.0]))
        found = module(features, torch.Size((9, 8, 7)[:dimensions]))
    assert found.composite.shape == (2, *(9, 8, 7)[:dimensions])
    for weights in (*found.levels, found.composite):
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.flatten(1).sum(1), torch.ones(2))
    assert found.beta.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_composite_is_the_levels_on_one_grid_weighted_by_beta(dimensions: int) -> None:
    module, features = pyramid(dimensions)
    space = torch.Size(SPACE[dimensions])
    with torch.no_grad():
        module.importance.copy_(torch.tensor([2.0, -1.0]))
        found = module(features, space)
        # The first level has the grid of the composite already.
        by_hand = found.beta[0] * found.levels[0] + found.beta[1] * on_grid(found.levels[1], space)
        scores = torch.einsum("bc...,c->b...", features[0], module.scores[0].weight.flatten())
    assert found.beta.tolist() == pytest.approx([math.exp(3) / (1 + math.exp(3)), 1 / (1 + math.exp(3))])
    torch.testing.assert_close(found.composite, by_hand)
    torch.testing.assert_close(found.levels[0], spatial_softmax(scores))


def test_importances_are_learned_and_start_equal() -> None:
    module, features = pyramid(2)
    found = module(features, torch.Size(SPACE[2]))
    assert found.beta.tolist() == [0.5, 0.5]
    found.composite[:, 0, 0].sum().backward()
    assert module.importance.grad.any()


def test_even_attention_has_entropy_one_and_a_single_place_none() -> None:
    even, single = torch.full((1, 2, 4), 1 / 8), torch.zeros(1, 2, 4)
    single[0, 1, 2] = 1
    assert attention_entropy(torch.cat([even, single])).tolist() == pytest.approx([1, 0], abs=1e-6)


def test_display_damps_attention_where_the_model_is_unsure() -> None:
    shown = damped(row(0.5, 0.3, 0.2), row(0.0, 0.1, 0.2))
    assert shown.flatten().tolist() == pytest.approx([0.5, 0.15, 0.0])
    assert damped(row(0.5, 0.5), row(0.0, 0.0)).flatten().tolist() == [0.5, 0.5]


def test_divergence_from_uncertainty_is_the_oracle_and_not_the_swapped_one() -> None:
    attention, uncertainty = row(0.5, 0.3, 0.2), row(0.1, 0.6, 0.3)
    assert value(uncertainty_alignment(attention, uncertainty, ONE, target="uncertainty")) == pytest.approx(0.5156818, abs=1e-6)
    assert value(uncertainty_alignment(uncertainty, attention, ONE, target="uncertainty")) == pytest.approx(0.3765840, abs=1e-6)


def test_the_uncertainty_of_a_map_counts_by_its_shape_not_its_size() -> None:
    attention = row(0.5, 0.3, 0.2)
    small = uncertainty_alignment(attention, row(0.01, 0.06, 0.03), ONE, target="uncertainty")
    assert value(small) == pytest.approx(0.5156818, abs=1e-5)


def test_confidence_asks_for_attention_where_the_model_is_sure() -> None:
    """U~ = softmax(-U / s), here with s the standard deviation of (0, 1, 2), sqrt(2/3)."""
    target = torch.softmax(-torch.tensor([0.0, 1.0, 2.0]) / math.sqrt(2 / 3), 0)
    attention = torch.tensor([0.2, 0.3, 0.5])
    expected = (attention * (attention / target).log()).sum().item()
    found = uncertainty_alignment(attention.view(1, 3, 1), row(0, 1, 2), ONE, target="confidence")
    assert value(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("target", "towards"), [("uncertainty", 2), ("confidence", 0)])
def test_the_two_targets_pull_in_opposite_directions(target: str, towards: int) -> None:
    scores = torch.zeros(1, 3, 1, requires_grad=True)
    uncertainty_alignment(spatial_softmax(scores), row(0.0, 0.2, 0.4), ONE, target=target).numerator.backward()
    # Descent raises the score whose gradient is lowest.
    assert scores.grad.flatten().argmin().item() == towards


def test_attention_that_has_reached_its_target_has_no_loss_and_the_uncertainty_no_gradient() -> None:
    uncertainty = row(0.1, 0.6, 0.3).requires_grad_()
    attention = row(0.1, 0.6, 0.3).requires_grad_()
    term = uncertainty_alignment(attention, uncertainty, ONE, target="uncertainty")
    term.numerator.backward()
    assert value(term) == pytest.approx(0, abs=1e-6)
    assert uncertainty.grad is None


def test_attention_that_underflows_has_a_finite_gradient() -> None:
    scores = torch.tensor([0.0, 200.0, -200.0]).view(1, 3, 1).requires_grad_()
    uncertainty_alignment(spatial_softmax(scores), row(0.1, 0.6, 0.3), ONE, target="uncertainty").numerator.backward()
    assert scores.grad.isfinite().all()


def test_peak_compares_attention_relative_to_its_largest_with_the_expert() -> None:
    # (1, .5, .25) against (1, 0, 0).
    term = clinical_alignment(row(4 / 7, 2 / 7, 1 / 7), row(1, 0, 0), KNOWN, ONE, scaling="peak")
    assert value(term) == pytest.approx((0.5**2 + 0.25**2) / 3)
    torch.testing.assert_close(relative_to_peak(row(4 / 7, 2 / 7, 1 / 7)), row(1, 0.5, 0.25))


def test_density_compares_both_as_distributions_whatever_their_grid() -> None:
    attention, expert = row(0.5, 0.25, 0.25), row(1, 1, 0)
    # 3 A = (1.5, .75, .75); 3 M / sum M = (1.5, 1.5, 0).
    expected = (0.75**2 + 0.75**2) / 3
    assert value(clinical_alignment(attention, expert, KNOWN, ONE, scaling="density")) == pytest.approx(expected)
    finer = clinical_alignment(attention.repeat_interleave(4, 1) / 4, expert.repeat_interleave(4, 1), KNOWN, ONE, scaling="density")
    assert value(finer) == pytest.approx(expected)


@pytest.mark.parametrize("scaling", ["peak", "density"])
def test_rows_without_an_expert_map_have_no_part(scaling: str) -> None:
    attention = torch.cat([row(0.5, 0.3, 0.2), row(0.1, 0.1, 0.8)])
    expert = torch.cat([row(1, 0, 0), row(math.nan, math.nan, math.nan)])
    term = clinical_alignment(attention, expert, torch.tensor([True, False]), torch.ones(2), scaling=scaling)
    alone = clinical_alignment(attention[:1], expert[:1], KNOWN, ONE, scaling=scaling)
    assert (value(term), term.weight.item()) == (pytest.approx(value(alone)), 1)


def test_a_map_without_a_finding_says_look_nowhere_or_has_no_density() -> None:
    attention, empty = row(0.5, 0.5), row(0, 0)
    assert value(clinical_alignment(attention, empty, KNOWN, ONE, scaling="peak")) == 1
    assert clinical_alignment(attention, empty, KNOWN, ONE, scaling="density").weight.item() == 0


def test_attention_outside_the_body_is_what_the_anatomical_term_counts() -> None:
    attention = torch.cat([row(0.5, 0.3, 0.2), row(0.1, 0.1, 0.8)])
    body = torch.cat([row(1, 1, 0), row(0, 0, 0)]).bool()
    term = anatomical(attention, body, torch.tensor([True, False]), torch.tensor([2.0, 1.0]))
    assert value(term) == pytest.approx(0.2)
    assert value(anatomical(attention, body, torch.tensor([True, True]), torch.tensor([3.0, 1.0]))) == pytest.approx((0.6 + 1) / 4)


def test_padding_rows_have_no_part_in_any_term() -> None:
    attention = torch.cat([row(0.5, 0.3, 0.2), row(0.1, 0.1, 0.8)])
    other = torch.cat([row(0.1, 0.6, 0.3), row(0.9, 0.1, 0.0)])
    weight, known = torch.tensor([1.0, 0.0]), torch.tensor([True, True])
    assert value(uncertainty_alignment(attention, other, weight, target="uncertainty")) == pytest.approx(0.5156818, abs=1e-6)
    assert clinical_alignment(attention, other, known, weight, scaling="peak").weight.item() == 1
    assert anatomical(attention, other > 0.2, known, weight).weight.item() == 1
