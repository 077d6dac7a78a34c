"""Diagonal Gaussians through layers: means and variances side by side, every number a random variable of its own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

# Added to the variance after every linear map, and the least after a ReLU: either may send all of it to 0, and KL takes its
# logarithm.
VARIANCE_FLOOR = 1e-4


@dataclass(frozen=True)
class Gaussian:
    """mean and variance of the same shape, or shapes that broadcast; variance >= 0."""

    mean: Tensor
    variance: Tensor


class GaussianLinear(nn.Module):
    """W x + b of x ~ N(mean, diag variance): mean W mean + b, variance (W * W) variance + floor; the marginals are exact.

    nn.Linear in parameters and in how it starts. What W makes of the components together, their covariance, is forgotten.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        # Of its own and not an nn.Linear's: ZeRO 3 gathers the parameters of the module that is called.
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))

    def forward(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """From (..., inputs), both, to (..., outputs). No Gaussian: ZeRO 3 finds no tensors in the output that is a dataclass."""
        through = functional.linear(variance, self.weight.square()) + VARIANCE_FLOOR
        return functional.linear(mean, self.weight, self.bias), through


def relu_moments(value: Gaussian) -> Gaussian:
    """The mean and variance of ReLU(x), x ~ N(m, s^2), s > 0.

    E = m Phi(m/s) + s phi(m/s);  E[x^2; x > 0] = (m^2 + s^2) Phi(m/s) + m s phi(m/s)   (textbook; oracle O17)

    The variance is held at the floor: far below 0 hardly anything passes, and the difference of moments has no digits left.
    """
    mean, variance = value.mean, value.variance
    deviation = variance.sqrt()
    ratio = mean / deviation
    above = 0.5 * (1 + torch.erf(ratio / math.sqrt(2)))
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    first = mean * above + deviation * density
    second = (mean.square() + variance) * above + mean * deviation * density
    return Gaussian(first, (second - first.square()).clamp_min(VARIANCE_FLOOR))


def independent_variance(weight: Tensor, variance: Tensor) -> Tensor:
    """sum_m a_m^2 v_m, from a (..., M) and v (..., M, Z) to (..., Z): the variance of sum_m a_m x_m, all independent.

    AUM's rule, heuristic by its authors' word. It shrinks with every neighbour, also with those that contradict one another
    (spec 2.4.3): it is how exact the mean of the neighbours is, never how far they agree.
    """
    return (weight.square().unsqueeze(-1) * variance).sum(-2)


def mixture_variance(weight: Tensor, value: Gaussian) -> Tensor:
    """sum_m a_m (v_m + mu_m^2) - mean^2, mean = sum_m a_m mu_m, to (..., Z): that of one neighbour drawn by its weight.

    It keeps their disagreement: computed as sum_m a_m (v_m + (mu_m - mean)^2), so it is never below 0.
    """
    weight = weight.unsqueeze(-1)
    mean = (weight * value.mean).sum(-2, keepdim=True)
    return (weight * (value.variance + (value.mean - mean).square())).sum(-2)


def kl_to_standard(value: Gaussian) -> Tensor:
    """KL(N(mean, diag variance) || N(0, I)) in nats: 0.5 sum_k (mean^2 + var - log var - 1), from (..., Z) to (...)."""
    return 0.5 * (value.mean.square() + value.variance - value.variance.log() - 1).sum(-1)
