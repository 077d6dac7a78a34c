"""Layers whose weights are distributions, w = mu + softplus(rho) eps (Blundell et al. 2015; BSSL proposal 2.2.1, spec 3.4).

Activations have two leading axes, (S, B, ...), as with MC dropout: S = 1 until the first draw. A layer draws in one of two ways:
- local reparameterisation (Kingma et al. 2015): the output of every study and place is drawn from its own Gaussian, whose mean and
  variance are closed forms; keyed by (seed, layer, epoch, uid, pass, element). In a convolution places draw independently, so that
  each is distributed as it would be with sampled weights, but not two of them together (Shridhar et al. 2019).
- weight sampling, the reference: one set of weights a pass, the same for every study, rank and micro-batch of a step; keyed by
  (seed, layer, optimizer step, pass, element).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from draf_dist import noise
from draf_dist.models.mc import per_pass

RHO_INIT = -3.0
# Keeps the gradient of a square root finite where all sigmas are as good as 0; its root is far below what f32 tells from 0.
_LEAST_VARIANCE = 1e-20


@dataclass(frozen=True)
class Draws:
    """The keys of S passes. study: int64 (S, B). weight: int64 (S,), of sampled weights; None: local reparameterisation."""

    study: Tensor
    weight: Tensor | None = None


def weight_keys(seed: int, step: int | None, passes: int, device: torch.device | str = "cpu") -> Tensor:
    """The keys int64 (S,) of sampled weights at an optimizer step, counted from 0; None in evaluation, which has its own seed."""
    number = torch.arange(passes, dtype=torch.int64, device=device)
    return noise.chain(seed, "variational", *([] if step is None else [step]), number)


class GaussianWeight(nn.Module):
    """A tensor of independent weights N(mean, softplus(rho)^2).

    mean starts as nn.Linear and nn.Conv do, uniform within 1 / sqrt(fan_in); rho at -3 is a sigma of .0486.
    """

    def __init__(self, shape: tuple[int, ...], *, fan_in: int, rho_init: float) -> None:
        super().__init__()
        bound = 1 / math.sqrt(fan_in)
        self.mean = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.rho = nn.Parameter(torch.full(shape, rho_init))
        self.stream = 0

    def forward(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every weight.

        The mean is a copy: under ZeRO 3 the parameter is there only while its own module runs.
        """
        return self.mean.clone(), functional.softplus(self.rho)

    def sample(self, keys: Tensor) -> Tensor:
        """Weights (S, *shape) of keys int64 (S,)."""
        mean, sigma = self()
        drawn = noise.normal(noise.chain(keys, self.stream), tuple(mean.shape))
        weights: Tensor = mean + sigma * drawn.to(mean.dtype)
        return weights

    def moments(self) -> Tensor:
        """See posterior_moments."""
        mean, sigma = self()
        count = mean.new_tensor(float(mean.numel()))
        log = sigma.clamp_min(torch.finfo(sigma.dtype).tiny).log()
        return torch.stack([count, log.sum(), sigma.square().sum(), mean.square().sum()])


class VariationalLayer(nn.Module):
    """A linear map of Gaussian weights; its kinds say which map. bias: Gaussian too, or none."""

    def __init__(self, shape: tuple[int, ...], *, bias: bool, rho_init: float) -> None:
        super().__init__()
        fan_in = math.prod(shape[1:])
        self.weight = GaussianWeight(shape, fan_in=fan_in, rho_init=rho_init)
        self.bias = GaussianWeight(shape[:1], fan_in=fan_in, rho_init=rho_init) if bias else None
        self.stream = 0

    def forward(self, values: Tensor, draws: Draws) -> Tensor:
        """Values (S or 1, B, inputs, ...) to (S, B, outputs, ...)."""
        return self.local(values, draws.study) if draws.weight is None else self.sampled(values, draws.weight)

    def local(self, values: Tensor, keys: Tensor) -> Tensor:
        """The output drawn itself, from N(E, V) of `output_moments`; keys int64 (S, B)."""
        mean, variance = self.output_moments(values)
        drawn = noise.normal(noise.chain(keys, self.stream), tuple(mean.shape[2:]))
        return mean + variance.clamp_min(_LEAST_VARIANCE).sqrt() * drawn.to(mean.dtype)

    def sampled(self, values: Tensor, keys: Tensor) -> Tensor:
        """One set of weights for each pass; keys int64 (S,)."""
        weights = self.weight.sample(keys).unbind()
        biases = [None] * len(weights) if self.bias is None else self.bias.sample(keys).unbind()
        # Of one pass there is a single input for all.
        inputs = values.expand(len(weights), *values.shape[1:])
        parts = zip(inputs, weights, biases, strict=True)
        return torch.stack([self.map(one, weight, bias) for one, weight, bias in parts])

    def output_moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """E = mu x + mu_b and V = sigma^2 x^2 + sigma_b^2 of the output, as of values (S or 1, B, ...) (oracle O19)."""
        mean, sigma = self.weight()
        bias_mean, bias_sigma = (None, None) if self.bias is None else self.bias()
        bias_variance = None if bias_sigma is None else bias_sigma.square()
        expected = per_pass(lambda flat: self.map(flat, mean, bias_mean), values)
        return expected, per_pass(lambda flat: self.map(flat.square(), sigma.square(), bias_variance), values)

    def expected(self, values: Tensor) -> Tensor:
        """The map with the means for weights: values (S or 1, B, inputs, ...) to (S or 1, B, outputs, ...)."""
        bias = None if self.bias is None else self.bias()[0]
        mean = self.weight()[0]
        return per_pass(lambda flat: self.map(flat, mean, bias), values)

    def map(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear map itself, of values (N, inputs, ...)."""
        raise NotImplementedError


class VariationalLinear(VariationalLayer):
    """(S or 1, B, ..., inputs) to (S, B, ..., outputs)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rho_init: float = RHO_INIT) -> None:
        super().__init__((outputs, inputs), bias=bias, rho_init=rho_init)

    def map(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product."""
        return functional.linear(values, weight, bias)


class VariationalConv2d(VariationalLayer):
    """(S or 1, B, inputs, H, W) to (S, B, outputs, H, W); kernel is odd and the image is padded with zeros."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True, rho_init: float = RHO_INIT) -> None:
        super().__init__((outputs, inputs, *[kernel] * 2), bias=bias, rho_init=rho_init)

    def map(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution."""
        return functional.conv2d(values, weight, bias, padding=weight.shape[-1] // 2)


class VariationalConv3d(VariationalLayer):
    """(S or 1, B, inputs, D, H, W) to (S, B, outputs, D, H, W); kernel is odd and the volume is padded with zeros."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True, rho_init: float = RHO_INIT) -> None:
        super().__init__((outputs, inputs, *[kernel] * 3), bias=bias, rho_init=rho_init)

    def map(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution."""
        return functional.conv3d(values, weight, bias, padding=weight.shape[-1] // 2)


class PointLayer(nn.Module):
    """An ordinary layer in the place of a variational one: the deterministic baselines of spec 3.7."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: Tensor, draws: Draws) -> Tensor:
        """Values (S or 1, B, inputs, ...) to (S or 1, B, outputs, ...); nothing is drawn."""
        return self.expected(values)

    def expected(self, values: Tensor) -> Tensor:
        """The same: a point is its own mean."""
        return per_pass(self.layer, values)


def name_draws(model: nn.Module) -> None:
    """Gives every variational layer and weight a stream of its own, from its qualified name."""
    for name, module in model.named_modules():
        if isinstance(module, VariationalLayer | GaussianWeight):
            module.stream = noise.chain("variational", name)


def posterior_moments(model: nn.Module) -> Tensor:
    """Of all Gaussian weights of a model: their number, sum ln sigma, sum sigma^2, sum mu^2, as f32 (4,).

    What the KL divergence from any Gaussian prior of mean 0 needs (losses/kl.py). To be called in the forward of the model: under
    ZeRO 3 there are no parameters outside. All 0 where no weight is Gaussian.
    """
    found = [module.moments() for module in model.modules() if isinstance(module, GaussianWeight)]
    return torch.stack(found).sum(0) if found else next(model.parameters()).new_zeros(4)


def posterior_sigma(moments: Tensor) -> Tensor:
    """The root mean square of sigma over all weights, of posterior_moments (..., 4), to (...); 0 where there are none."""
    return (moments[..., 2] / moments[..., 0].clamp_min(1)).sqrt()
