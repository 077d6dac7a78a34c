"""Soft Dice and cross-entropy of masks: O20, hand-made maps, and no row looks at another (spec 3.6)."""

import math

import pytest
import torch
from torch import Tensor

from draf_dist.losses.segmentation import dice, segmentation_terms, voxel_cross_entropy
from draf_dist.schema.batch import SegmentationTarget, Term
from draf_dist.schema.label import IGNORED


def of_probability(*second: float) -> Tensor:
    """Logits (1, 1, 2, 1, places) of two classes."""
    p = torch.tensor(second, dtype=torch.float64)
    return torch.stack([1 - p, p]).log().view(1, 1, 2, 1, -1)


def mask_of(*labels: int) -> Tensor:
    return torch.tensor(labels).view(1, 1, -1)


def value(term: Term) -> float:
    return (term.numerator / term.weight).item()


def random_case(rows: int = 6, classes: int = 3) -> tuple[Tensor, SegmentationTarget, Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(2, rows, classes, 5, 4, generator=generator)
    mask = torch.randint(0, classes, (rows, 5, 4), generator=generator)
    mask[1] = 0
    weight = torch.ones(rows)
    weight[4] = 0
    return logits, SegmentationTarget(mask, torch.arange(rows) != 3), weight


def test_soft_dice_of_two_voxels_is_that_of_the_oracle() -> None:
    found, defined = dice(of_probability(0.9, 0.2), mask_of(1, 0))
    assert found.item() == pytest.approx(0.8571429, abs=1e-6)
    assert defined.item()


def test_terms_of_two_voxels_are_those_by_hand() -> None:
    target = SegmentationTarget(mask_of(1, 0), torch.tensor([True]))
    terms = segmentation_terms(of_probability(0.9, 0.2), target, torch.ones(1, dtype=torch.float64))
    assert value(terms["dice"]) == pytest.approx(1 - 1.8 / 2.1)
    assert value(terms["cross_entropy"]) == pytest.approx(-(math.log(0.9) + math.log(0.8)) / 2)


def test_the_mean_is_over_the_structures_that_are_there() -> None:
    """Three classes in 4 voxels, of which the third does not occur: the background and it have no part."""
    probability = torch.tensor([[0.7, 0.2, 0.1, 0.6], [0.2, 0.7, 0.8, 0.1], [0.1, 0.1, 0.1, 0.3]]).view(1, 1, 3, 1, 4)
    found, _ = dice(probability.log(), mask_of(0, 1, 1, 0))
    assert found.item() == pytest.approx(2 * 1.5 / (1.8 + 2))
    both, _ = dice(probability.log(), mask_of(0, 1, 1, 2))
    assert both.item() == pytest.approx((2 * 1.5 / (1.8 + 2) + 2 * 0.3 / (0.6 + 1)) / 2)


def test_a_mask_of_background_has_no_dice_but_a_cross_entropy() -> None:
    target = SegmentationTarget(mask_of(0, 0), torch.tensor([True]))
    terms = segmentation_terms(of_probability(0.9, 0.2), target, torch.ones(1))
    assert terms["dice"].weight.item() == terms["dice"].numerator.item() == 0
    assert value(terms["cross_entropy"]) == pytest.approx(-(math.log(0.1) + math.log(0.8)) / 2)


def test_a_perfect_mask_costs_nothing_and_a_wrong_one_everything() -> None:
    target = SegmentationTarget(mask_of(1, 0, 1), torch.tensor([True]))
    right, wrong = of_probability(1 - 1e-9, 1e-9, 1 - 1e-9), of_probability(1e-9, 1 - 1e-9, 1e-9)
    assert value(segmentation_terms(right, target, torch.ones(1))["dice"]) == pytest.approx(0, abs=1e-6)
    assert value(segmentation_terms(wrong, target, torch.ones(1))["dice"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("cut", [(6,), (1, 5), (2, 0, 3, 1)])
def test_terms_do_not_depend_on_how_rows_are_split(cut: tuple[int, ...]) -> None:
    logits, target, weight = random_case()
    whole = segmentation_terms(logits, target, weight)
    starts = [sum(cut[:number]) for number in range(len(cut))]
    rows = [slice(start, start + size) for start, size in zip(starts, cut, strict=True)]
    parts = [
        segmentation_terms(logits[:, part], SegmentationTarget(target.mask[part], target.observed[part]), weight[part])
        for part in rows
    ]
    for name, term in whole.items():
        assert sum(part[name].numerator.item() for part in parts) == pytest.approx(term.numerator.item(), rel=1e-6)
        assert sum(part[name].weight.item() for part in parts) == term.weight.item()


def test_unobserved_and_padding_rows_change_nothing() -> None:
    logits, target, weight = random_case()
    whole = segmentation_terms(logits, target, weight)
    # Row 3 is not observed, row 4 is padding, row 1 has no structure.
    assert (whole["cross_entropy"].weight.item(), whole["dice"].weight.item()) == (4, 3)
    other = logits.clone()
    other[:, 3] = math.nan
    other[:, 4] *= 5
    changed = segmentation_terms(other, target, weight)
    for name, term in whole.items():
        assert torch.equal(changed[name].numerator, term.numerator)
    gradient = torch.autograd.grad(segmentation_terms(logits.requires_grad_(), target, weight)["dice"].numerator, logits)[0]
    assert not gradient[:, [1, 3, 4]].any()
    assert gradient.isfinite().all()


def test_passes_are_averaged_after_their_loss() -> None:
    logits, target, weight = random_case()
    both = segmentation_terms(logits, target, weight)
    each = [segmentation_terms(logits[s : s + 1], target, weight) for s in range(2)]
    for name, term in both.items():
        assert value(term) == pytest.approx((value(each[0][name]) + value(each[1][name])) / 2, rel=1e-6)


def test_gradients_match_finite_differences_in_three_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 3, 2, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.randint(0, 3, (2, 2, 2, 2), generator=generator)
    assert torch.autograd.gradcheck(lambda x: dice(x, mask)[0], logits)
    assert torch.autograd.gradcheck(lambda x: voxel_cross_entropy(x, mask), logits)


def test_voxels_of_which_nobody_says_what_they_are_count_in_no_term() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 3, 2, 4, generator=generator).requires_grad_()
    mask = torch.randint(0, 3, (3, 2, 4), generator=generator)
    mask[0, 1], mask[2] = IGNORED, IGNORED
    observed = torch.ones(3, dtype=torch.bool)
    found = segmentation_terms(logits, SegmentationTarget(mask, observed), torch.ones(3))
    (gradient,) = torch.autograd.grad(sum(term.numerator for term in found.values()), logits)
    assert (gradient[:, 0, :, 1] == 0).all()
    assert (gradient[:, 2] == 0).all()
    assert (gradient[:, 0, :, 0] != 0).all()
    # The first study is what it would be without its second line; of the third there is nothing.
    without = segmentation_terms(logits[:, :1, :, :1], SegmentationTarget(mask[:1, :1], observed[:1]), torch.ones(1))
    second = segmentation_terms(logits[:, 1:2], SegmentationTarget(mask[1:2], observed[:1]), torch.ones(1))
    for name, term in found.items():
        expected = without[name].numerator + second[name].numerator
        torch.testing.assert_close(term.numerator, expected)
        assert term.weight.item() == 2
