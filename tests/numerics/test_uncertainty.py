"""O2, O3 and the identities of the decomposition (spec 1.1 rows 2-3, 1.4)."""

import math

import pytest
import torch

from draf_dist.models.link import Link
from draf_dist.models.uncertainty import decompose, entropy, logit_variance

CLOSE = {"abs": 1e-7}

CLASSES = Link(exclusive=True)


def binary(*class_one: float) -> torch.Tensor:
    ones = torch.tensor(class_one, dtype=torch.float64)
    return torch.stack([1 - ones, ones], dim=-1)


def random_probability(classes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(7, 50, classes, generator=generator, dtype=torch.float64)).softmax(-1)


def test_binary_parts_are_those_of_a_bernoulli() -> None:
    parts = decompose(binary(0.2, 0.4, 0.9))
    assert parts["epistemic"].item() == pytest.approx(0.26 / 3, **CLOSE)
    assert parts["aleatoric"].item() == pytest.approx(0.49 / 3, **CLOSE)
    assert parts["total"].item() == pytest.approx(0.25, **CLOSE)


def test_three_classes_give_the_traces_and_entropies_of_the_spec() -> None:
    probability = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    parts = {name: value.item() for name, value in decompose(probability).items()}
    expected = {"epistemic": 0.0911111, "aleatoric": 0.5466667, "total": 0.6377778, "entropy": 1.0564242, "mi": 0.1291769}
    assert parts == pytest.approx(expected, abs=5e-8)
    assert entropy(probability).mean().item() == pytest.approx(0.9272474, abs=5e-8)


def test_three_classes_give_the_diagonals_of_the_spec_and_the_matrices_add_up() -> None:
    """O3: the proposal's matrices, of whose diagonal every class is what it is by itself."""
    probability = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    mean = probability.mean(0)
    assert mean.tolist() == pytest.approx([0.4666667, 0.2333333, 0.3], abs=1e-6)
    by_class = [decompose(torch.stack([1 - p, p], dim=-1)) for p in probability.unbind(1)]
    diagonal = {"epistemic": [0.0422222, 0.0022222, 0.0466667], "aleatoric": [0.2066667, 0.1766667, 0.1633333]}
    for name, expected in diagonal.items():
        found = [parts[name].item() for parts in by_class]
        assert found == pytest.approx(expected, abs=1e-6)
        assert sum(found) == pytest.approx(decompose(probability)[name].item(), abs=1e-12)
    outer = torch.einsum("sk,sl->kl", probability, probability) / 3
    epistemic, aleatoric = outer - torch.outer(mean, mean), torch.diag(mean) - outer
    assert torch.diagonal(epistemic).tolist() == pytest.approx(diagonal["epistemic"], abs=1e-6)
    error = epistemic + aleatoric - (torch.diag(mean) - torch.outer(mean, mean))
    assert error.abs().max() < 1e-15


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_total_is_aleatoric_plus_epistemic(classes: int) -> None:
    parts = decompose(random_probability(classes))
    torch.testing.assert_close(parts["total"], parts["aleatoric"] + parts["epistemic"], atol=1e-7, rtol=0)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_entropy_is_mutual_information_plus_expected_entropy(classes: int) -> None:
    probability = random_probability(classes)
    parts = decompose(probability)
    torch.testing.assert_close(parts["entropy"], parts["mi"] + entropy(probability).mean(0), atol=1e-7, rtol=0)
    assert (parts["mi"] > 0).all()


@pytest.mark.parametrize(("classes", "bound"), [(2, 1 / 4), (4, 3 / 4)])
def test_total_is_at_most_a_quarter_for_two_classes_and_one_minus_a_share_for_more(classes: int, bound: float) -> None:
    even = torch.eye(classes, dtype=torch.float64)
    assert decompose(even)["total"].item() == pytest.approx(bound)
    assert (decompose(random_probability(classes))["total"] <= bound + 1e-12).all()


def test_constant_passes_have_no_epistemic_part() -> None:
    parts = decompose(binary(0.3, 0.3, 0.3))
    assert parts["epistemic"].item() == pytest.approx(0.0, abs=1e-30)
    assert parts["mi"].item() == pytest.approx(0.0, abs=1e-15)


def test_certain_predictions_have_finite_gradients() -> None:
    logits = torch.tensor([[[200.0, -200.0]], [[-200.0, 200.0]]], requires_grad=True)
    sum(decompose(logits.softmax(-1)).values()).sum().backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_probability_variance_is_the_logit_variance_times_the_squared_slope() -> None:
    # Why U is a risk score (findings 1): the delta method at p = .1 for a small spread of the log odds.
    odds = math.log(0.1 / 0.9) + torch.tensor([-0.01, 0.0, 0.01], dtype=torch.float64)
    logits = torch.stack([torch.zeros_like(odds), odds], dim=-1)
    slope = 0.1 * 0.9
    assert logit_variance(logits).item() == pytest.approx(0.0002 / 3, rel=1e-9)
    assert decompose(logits.softmax(-1))["epistemic"].item() == pytest.approx(slope**2 * 0.0002 / 3, rel=1e-3)


def test_logit_variance_does_not_depend_on_the_level_of_the_logits() -> None:
    logits = torch.randn(5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(logit_variance(logits), logit_variance(logits + torch.randn(5, 4, 1, dtype=torch.float64)))


def test_prior_shift_makes_a_modality_without_evidence_the_least_certain() -> None:
    # At 10 % prevalence "no evidence" means p = .1; unshifted, the alarm at p = .5 has the larger entropy.
    prevalence = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    no_evidence, alarm = prevalence.expand(2, 2), torch.zeros(2, 2, dtype=torch.float64)
    logits = torch.stack([no_evidence, alarm], dim=1)
    plain = CLASSES.uncertainty("probability", "entropy", logits, prevalence)
    shifted = CLASSES.uncertainty("prior_shifted", "entropy", logits, prevalence)
    assert plain[1] > plain[0]
    assert shifted[0] > shifted[1]
    assert shifted[0].item() == pytest.approx(math.log(2))
