"""Uncertainties pass by pass: equal to those of all passes at once, for maps, classes and questions (O3, spec 3.4)."""

import pytest
import torch
from torch import Tensor

from draf_dist.models.link import Link
from draf_dist.models.streamed import StreamedUncertainty, streamed
from draf_dist.models.uncertainty import decompose

CLASSES, QUESTIONS = Link(exclusive=True), Link(exclusive=False)


def random_logits(*shape: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def test_three_passes_of_one_voxel_give_the_numbers_of_the_oracle() -> None:
    found = StreamedUncertainty(CLASSES)
    for probability in ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), (0.2, 0.2, 0.6)):
        found.add(torch.tensor(probability).view(1, 3, 1, 1))
    parts = {name: value.item() for name, value in found.uncertainties().items()}
    expected = {"epistemic": 0.0911111, "aleatoric": 0.5466667, "total": 0.6377778, "entropy": 1.0564242, "mi": 0.1291769}
    assert parts == pytest.approx(expected, abs=1e-6)
    assert found.probability.flatten().tolist() == pytest.approx([0.4666667, 0.2333333, 0.3], abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("space", [(), (5, 4), (3, 4, 2)])
def test_streamed_equals_all_passes_at_once(classes: int, space: tuple[int, ...]) -> None:
    logits = random_logits(30, 2, classes, *space)
    expected = decompose(logits.movedim(2, -1).softmax(-1))
    found = streamed(logits.unbind(), CLASSES)
    assert found.passes == 30
    torch.testing.assert_close(found.probability, logits.softmax(2).mean(0))
    for name, value in found.uncertainties().items():
        assert value.shape == (2, *space)
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("space", [(), (4, 3)])
def test_of_several_questions_it_is_the_mean_over_them(space: tuple[int, ...]) -> None:
    logits = random_logits(9, 3, 5, *space)
    expected = QUESTIONS.uncertainties(logits.movedim(2, -1))
    found = streamed(logits.unbind(), QUESTIONS)
    torch.testing.assert_close(found.probability, logits.sigmoid().mean(0))
    for name, value in found.uncertainties().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def test_a_small_epistemic_variance_is_not_lost_in_the_sums() -> None:
    """Passes that differ by 1e-4: the variance is 1e-9, which sums of squares in f32 could not tell from 0."""
    logits = random_logits(1, 2, 3, 4, 4) + random_logits(20, 2, 3, 4, 4, spread=1e-4)
    expected = decompose(logits.double().movedim(2, -1).softmax(-1))["epistemic"]
    assert expected.max() < 1e-8
    torch.testing.assert_close(streamed(logits.unbind(), CLASSES).uncertainties()["epistemic"], expected.float(), rtol=0.02, atol=0)


def test_total_is_aleatoric_plus_epistemic_and_matrices_say_the_same() -> None:
    """The proposal's formulas are matrices: mean p p^T - pbar pbar^T and mean (diag p - p p^T); ours are their traces."""
    logits = random_logits(6, 1, 4)
    parts = streamed(logits.unbind(), CLASSES).uncertainties()
    p = logits[:, 0].double().softmax(-1)
    mean = p.mean(0)
    outer = torch.einsum("sk,sl->kl", p, p) / 6
    epistemic, aleatoric = outer - torch.outer(mean, mean), torch.diag(mean) - outer
    torch.testing.assert_close(epistemic + aleatoric, torch.diag(mean) - torch.outer(mean, mean), atol=1e-15, rtol=0)
    assert parts["epistemic"].item() == pytest.approx(epistemic.trace().item(), abs=1e-7)
    assert parts["aleatoric"].item() == pytest.approx(aleatoric.trace().item(), abs=1e-7)
    assert parts["total"].item() == pytest.approx((parts["aleatoric"] + parts["epistemic"]).item(), abs=1e-7)


def test_passes_that_agree_leave_no_epistemic_uncertainty() -> None:
    logits = random_logits(1, 2, 3, 5).expand(8, -1, -1, -1)
    parts = streamed(logits.unbind(), CLASSES).uncertainties()
    assert parts["epistemic"].max() < 1e-12
    assert parts["mi"].max() < 1e-12
    torch.testing.assert_close(parts["aleatoric"], parts["total"])
