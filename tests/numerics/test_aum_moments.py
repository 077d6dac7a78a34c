"""O6, O7, O17: Gaussians fused, compared and rectified."""

import pytest
import torch
from torch import Tensor, nn

from draf_dist.models.aum_graph import Edges, inverse_logits, precision_logits
from draf_dist.models.gaussian import (
    VARIANCE_FLOOR,
    Gaussian,
    GaussianLinear,
    independent_variance,
    kl_to_standard,
    mixture_variance,
    relu_moments,
)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two modalities of one component: (..., M, Z) with Z = 1.
MU, V = doubles(0, 10).view(2, 1), doubles(1, 4).view(2, 1)


def attention(logits: Tensor) -> Tensor:
    value = Gaussian(torch.zeros(*logits.shape, 1), torch.ones(*logits.shape, 1))
    every = torch.ones(logits.shape, dtype=torch.bool)
    return Edges(value, logits, every, every[..., 0]).attention


def fused(weight: Tensor) -> tuple[float, float, float]:
    """Mean, independent and mixture variance of the oracle's two modalities."""
    mean = (weight.unsqueeze(-1) * MU).sum()
    return float(mean), float(independent_variance(weight, V)), float(mixture_variance(weight, Gaussian(MU, V)))


def test_precision_weights_are_those_of_the_least_variance() -> None:
    weight = attention(precision_logits(V.squeeze(1)))
    assert weight.tolist() == pytest.approx([0.8, 0.2], abs=1e-6)
    assert fused(weight) == pytest.approx((2.0, 0.8, 17.6), abs=1e-6)
    assert fused(weight)[1] == pytest.approx(1 / (1 + 1 / 4), abs=1e-12)
    for other in (0.7, 0.79, 0.81, 0.9):
        assert fused(doubles(other, 1 - other))[1] > 0.8


def test_literal_weights() -> None:
    weight = attention(inverse_logits(V.squeeze(1), 1.0, eps=0))
    assert weight.tolist() == pytest.approx([0.6791787, 0.3208213], abs=1e-6)
    assert fused(weight)[:2] == pytest.approx((3.2082130, 0.8729889), abs=1e-6)
    sharp = attention(inverse_logits(V.squeeze(1), 0.1, eps=0))
    assert sharp.tolist() == pytest.approx([0.99944722, 0.00055278], abs=1e-6)


def test_equal_weights() -> None:
    assert fused(doubles(0.5, 0.5)) == pytest.approx((5, 1.25, 27.5), abs=1e-6)


@pytest.mark.parametrize(("theta", "third"), [(1, 0.1689416), (0.5, 0.0763400), (0.2, 0.0055238), (0.1, 0.0000617)])
def test_a_high_variance_hardly_silences_at_a_temperature_of_one(theta: float, third: float) -> None:
    weight = attention(inverse_logits(doubles(1, 1, 10), theta, eps=0))
    assert float(weight[2]) == pytest.approx(third, abs=1e-6)


def test_the_mixture_is_the_second_moment_less_the_square_of_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, variance, raw = torch.rand(3, 5, 4, 7, generator=generator, dtype=torch.float64)
    weight = raw[..., 0].softmax(-1)
    literal = (weight.unsqueeze(-1) * (variance + mean.square())).sum(-2) - (weight.unsqueeze(-1) * mean).sum(-2).square()
    torch.testing.assert_close(mixture_variance(weight, Gaussian(mean, variance)), literal)


def test_kl_to_the_standard_normal() -> None:
    assert float(kl_to_standard(Gaussian(doubles(1, 0), doubles(0.25, 1)))) == pytest.approx(0.8181472, abs=1e-6)
    assert float(kl_to_standard(Gaussian(doubles(1), doubles(0.25)))) == pytest.approx(0.8181472, abs=1e-6)
    assert float(kl_to_standard(Gaussian(doubles(0.1), doubles(0.05**2)))) == pytest.approx(2.5019823, abs=1e-6)
    assert float(kl_to_standard(Gaussian(doubles(0), doubles(0.0485874**2)))) == pytest.approx(2.5255724, abs=1e-6)
    assert float(kl_to_standard(Gaussian(doubles(0, 0), doubles(1, 1)))) == 0


def test_kl_is_that_of_torch() -> None:
    mean, variance = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64) + 0.1
    there = torch.distributions.Normal(mean, variance.sqrt())
    theirs = torch.distributions.kl_divergence(there, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(kl_to_standard(Gaussian(mean, variance)), theirs)


def test_relu_of_the_standard_normal() -> None:
    found = relu_moments(Gaussian(doubles(0), doubles(1)))
    assert float(found.mean) == pytest.approx(0.3989423, abs=1e-6)
    assert float(found.variance) == pytest.approx(0.3408451, abs=1e-6)


@pytest.mark.parametrize(("mean", "variance"), [(-2.0, 1.0), (0.5, 0.25), (3.0, 4.0), (20.0, 0.5)])
def test_relu_moments_are_those_of_samples(mean: float, variance: float) -> None:
    found = relu_moments(Gaussian(doubles(mean), doubles(variance)))
    samples = mean + variance**0.5 * torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(found.mean) == pytest.approx(float(samples.relu().mean()), rel=0.01, abs=1e-3)
    assert float(found.variance) == pytest.approx(float(samples.relu().var()), rel=0.02, abs=1e-4)


def test_far_below_zero_nothing_passes_and_everything_stays_finite() -> None:
    value = Gaussian(torch.tensor([-1e4, -30.0, 0.0, 1e4], requires_grad=True), torch.full((4,), 1e-4, requires_grad=True))
    found = relu_moments(value)
    assert found.mean.tolist() == pytest.approx([0, 0, 1e-2 * 0.3989423, 1e4], abs=1e-6)
    assert (found.variance >= VARIANCE_FLOOR).all()
    (found.mean.sum() + found.variance.sum()).backward()
    for part in (value.mean, value.variance):
        assert part.grad is not None
        assert torch.isfinite(part.grad).all()


def test_a_linear_map_of_a_gaussian() -> None:
    torch.manual_seed(0)
    layer = GaussianLinear(5, 3).double()
    mean, variance = torch.randn(2, 5, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    found = Gaussian(*layer(mean, variance))
    torch.testing.assert_close(found.mean, nn.functional.linear(mean, layer.weight, layer.bias))
    whole = torch.stack([layer.weight @ torch.diag(row) @ layer.weight.T for row in variance])
    torch.testing.assert_close(found.variance, torch.diagonal(whole, dim1=-2, dim2=-1) + VARIANCE_FLOOR)


def test_the_gradients_of_all_moments_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, variance, raw = ((torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) + 0.2).requires_grad_() for _ in range(3))

    def everything(m: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        weight, rectified = w[..., 0].softmax(-1), relu_moments(Gaussian(m - 0.5, v))
        value = Gaussian(m, v)
        return (
            rectified.mean,
            rectified.variance,
            mixture_variance(weight, value),
            independent_variance(weight, v),
            kl_to_standard(value),
        )

    assert torch.autograd.gradcheck(everything, (mean, variance, raw))
