"""O8, and what NT-Xent counts as a negative."""

import math

import pytest
import torch
from torch import Tensor

from draf_dist.losses.gather import Embeddings
from draf_dist.losses.nt_xent import nt_xent

A = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
B = torch.tensor([[0.6, 0.8], [0.8, 0.6]], dtype=torch.float64)


def rows(first: Tensor, second: Tensor, uid: list[int] | None = None, valid: list[bool] | None = None) -> Embeddings:
    count = first.shape[0]
    return Embeddings(first, second, torch.tensor(uid or list(range(count))), torch.tensor(valid or [True] * count))


def mean_of(embeddings: Embeddings, tau: float = 0.5) -> float:
    term = nt_xent(embeddings, tau=tau)
    return (term.numerator / term.weight).item()


def random_views(count: int, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    return first, second


def literal_sum(first: Tensor, second: Tensor, tau: float) -> float:
    """The seed's equation as it stands: a sum over the anchors of the first view, not averaged."""
    both = torch.cat([first, second])
    count, total = len(first), 0.0
    for i in range(count):
        others = sum(math.exp(float(first[i] @ both[k]) / tau) for k in range(2 * count) if k != i)
        total -= math.log(math.exp(float(first[i] @ second[i]) / tau) / others)
    return total


def test_oracle_both_views_are_anchors_and_the_mean_is_taken() -> None:
    assert mean_of(rows(A, B)) == pytest.approx(1.2707137, abs=1e-6)


def test_oracle_of_the_literal_sum_is_another_number() -> None:
    assert literal_sum(A, B, 0.5) == pytest.approx(2.0542459, abs=1e-6)


def test_equal_views_of_orthogonal_studies() -> None:
    expected = math.log(1 + 2 * math.exp(-2))
    assert expected == pytest.approx(0.2395448, abs=1e-6)
    assert mean_of(rows(A, A)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_monai_gives_the_same_value_and_gradient_in_one_process(tau: float) -> None:
    from monai.losses.contrastive import ContrastiveLoss  # takes seconds to import

    first, second = (values.requires_grad_() for values in random_views(7))
    term = nt_xent(rows(first, second), tau=tau)
    ours = term.numerator / term.weight
    theirs = ContrastiveLoss(temperature=tau)(first, second)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for mine, other in zip(torch.autograd.grad(ours, (first, second)), torch.autograd.grad(theirs, (first, second)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8)


def test_a_study_drawn_twice_is_no_negative_of_itself() -> None:
    first, second = random_views(4)
    doubled = rows(torch.cat([first, first[:1]]), torch.cat([second, second[:1]]), uid=[0, 1, 2, 3, 0])
    anchor = nt_xent(rows(first, second), tau=0.5)
    # By hand: study 0 counts twice as an anchor, each time against the three others, and twice as a negative of those.
    both = torch.nn.functional.normalize(torch.cat([doubled.first, doubled.second]), dim=1)
    uid = doubled.uid.repeat(2)
    total = 0.0
    for i in range(10):
        own = (i + 5) % 10
        counted = [k for k in range(10) if k == own or uid[k] != uid[i]]
        similarity = both[i] @ both[counted].T / 0.5
        total += float(similarity.logsumexp(0) - both[i] @ both[own] / 0.5)
    assert mean_of(doubled) == pytest.approx(total / 10, abs=1e-9)
    as_strangers = rows(doubled.first, doubled.second)
    assert mean_of(as_strangers) > mean_of(doubled) + 0.05
    assert anchor.weight.item() == 8


def test_rows_that_are_not_valid_change_neither_value_nor_gradient() -> None:
    first, second = random_views(4)
    plain = [values.clone().requires_grad_() for values in (first, second)]
    filler = torch.full((2, 5), float("nan"), dtype=torch.float64)
    padded = [torch.cat([values, filler]).requires_grad_() for values in (first, second)]
    term = nt_xent(rows(plain[0], plain[1]), tau=0.1)
    other = nt_xent(rows(padded[0], padded[1], uid=[0, 1, 2, 3, -1, 2], valid=[True] * 4 + [False] * 2), tau=0.1)
    assert other.weight == term.weight
    torch.testing.assert_close(other.numerator, term.numerator, rtol=1e-12, atol=0)
    for mine, theirs in zip(torch.autograd.grad(term.numerator, plain), torch.autograd.grad(other.numerator, padded), strict=True):
        torch.testing.assert_close(theirs[:4], mine)
        assert not theirs[4:].any()


def test_a_batch_without_a_valid_row_is_zero_with_a_gradient() -> None:
    first, second = (values.requires_grad_() for values in random_views(2))
    term = nt_xent(rows(first, second, valid=[False, False]), tau=0.1)
    assert (term.numerator.item(), term.weight.item()) == (0.0, 0.0)
    term.numerator.backward()
    assert first.grad is not None
    assert not first.grad.any()


def test_the_length_of_an_embedding_plays_no_part() -> None:
    first, second = random_views(4)
    assert mean_of(rows(3 * first, second / 7)) == pytest.approx(mean_of(rows(first, second)), abs=1e-12)


def test_autocast_does_not_coarsen_it() -> None:
    first, second = (values.float() for values in random_views(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nt_xent(rows(first, second), tau=0.1).numerator
    assert inside.dtype is torch.float32
    assert inside.item() == nt_xent(rows(first, second), tau=0.1).numerator.item()
