"""Gaussian weights: O7, O19, what the two ways to draw have in common and what not, the limit of no variance (spec 3.4, 3.8)."""

import math

import pytest
import torch
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.losses.kl import gaussian_kl, kl_term, kl_warmup
from draf_dist.models.variational import (
    Draws,
    GaussianWeight,
    VariationalConv2d,
    VariationalConv3d,
    VariationalLayer,
    VariationalLinear,
    name_draws,
    posterior_moments,
    posterior_sigma,
    weight_keys,
)

MANY = 100_000


def study_keys(rows: int, passes: int, seed: int = 0, epoch: int = 0) -> Tensor:
    return noise.sample_keys(seed, "mc", torch.full((rows,), epoch), torch.arange(rows) + 7, passes)


def rho_of(sigma: float) -> float:
    return math.log(math.expm1(sigma))


def moments_of(mean: float, sigma: float) -> Tensor:
    return torch.tensor([1.0, math.log(sigma), sigma**2, mean**2], dtype=torch.float64)


def layers() -> dict[str, tuple[VariationalLayer, Tensor]]:
    """One of each kind with an input of two rows in one pass."""
    torch.manual_seed(0)
    made: dict[str, tuple[VariationalLayer, Tensor]] = {
        "linear": (VariationalLinear(5, 4), torch.randn(1, 2, 5)),
        "conv2d": (VariationalConv2d(2, 3, 3), torch.randn(1, 2, 2, 5, 4)),
        "conv3d": (VariationalConv3d(2, 3, 3), torch.randn(1, 2, 2, 4, 3, 5)),
    }
    for layer, _ in made.values():
        name_draws(layer)
        with torch.no_grad():
            # Of many sizes, so that a variance in the wrong place shows.
            layer.weight.rho.copy_(torch.randn(layer.weight.rho.shape) - 1)
            layer.bias.rho.copy_(torch.randn(layer.bias.rho.shape) - 1)
    return made


every_layer = pytest.mark.parametrize("kind", ["linear", "conv2d", "conv3d"])


@pytest.mark.parametrize(
    ("mean", "sigma", "prior", "expected"),
    [
        (1.0, 0.5, 1.0, 0.8181472),
        (0.1, 0.05, 1.0, 2.5019823),
        (0.1, 0.05, 0.1, 0.8181472),
        (0.0, 0.0485874, 1.0, 2.5255724),
    ],
)
def test_divergence_of_one_weight_is_the_closed_form(mean: float, sigma: float, prior: float, expected: float) -> None:
    assert gaussian_kl(moments_of(mean, sigma), prior_sigma=prior).item() == pytest.approx(expected, abs=1e-6)


def test_divergence_of_two_weights_is_their_sum() -> None:
    """The bottleneck of O7: mu = (1, 0), variance = (.25, 1)."""
    moments = moments_of(1.0, 0.5) + moments_of(0.0, 1.0)
    assert gaussian_kl(moments, prior_sigma=1.0).item() == pytest.approx(0.8181472, abs=1e-6)


def test_divergence_is_summed_over_all_weights_of_a_model_and_agrees_with_torch() -> None:
    model = nn.ModuleList([layer for layer, _ in layers().values()])
    expected = 0.0
    for part in model.modules():
        if isinstance(part, GaussianWeight):
            mean, sigma = (value.double() for value in part())
            posterior, prior = torch.distributions.Normal(mean, sigma), torch.distributions.Normal(0.0, 0.3)
            expected += torch.distributions.kl_divergence(posterior, prior).sum().item()
    found = gaussian_kl(posterior_moments(model), prior_sigma=0.3)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert posterior_moments(model)[0].item() == sum(p.numel() for p in model.parameters()) / 2


def test_gradient_of_the_divergence_is_that_of_the_formula() -> None:
    layer, prior = layers()["linear"][0], 0.2
    gaussian_kl(posterior_moments(layer), prior_sigma=prior).backward()
    mean, sigma = (value.detach() for value in layer.weight())
    torch.testing.assert_close(layer.weight.mean.grad, mean / prior**2)
    torch.testing.assert_close(layer.weight.rho.grad, (sigma / prior**2 - 1 / sigma) * layer.weight.rho.detach().sigmoid())


def test_every_weight_starts_with_the_sigma_and_the_divergence_of_the_spec() -> None:
    layer = VariationalLinear(3, 2)
    torch.testing.assert_close(layer.weight()[1], torch.full((2, 3), 0.0485874), atol=1e-7, rtol=0)
    assert posterior_sigma(posterior_moments(layer)).item() == pytest.approx(0.0485874, abs=1e-6)
    with torch.no_grad():
        layer.weight.mean.zero_()
        layer.bias.mean.zero_()
    # At mu 0, against the default prior .1: .340 a weight.
    assert gaussian_kl(posterior_moments(layer), prior_sigma=0.1).item() / 8 == pytest.approx(0.340, abs=5e-4)


def test_means_start_as_those_of_torch_do() -> None:
    torch.manual_seed(3)
    ours = torch.cat([VariationalConv2d(4, 16, 3).weight.mean.flatten() for _ in range(20)])
    theirs = torch.cat([nn.Conv2d(4, 16, 3).weight.flatten() for _ in range(20)])
    assert ours.abs().max().item() == pytest.approx(1 / math.sqrt(36), rel=1e-3)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.03)


@pytest.mark.parametrize("way", ["local", "weights"])
def test_linear_output_has_the_mean_and_variance_of_the_closed_form(way: str) -> None:
    """O19: x = (1, 2), mu = (.5, -1), sigma = (.1, .2), bias 0 +- .05."""
    layer = VariationalLinear(2, 1)
    name_draws(layer)
    with torch.no_grad():
        layer.weight.mean.copy_(torch.tensor([[0.5, -1.0]]))
        layer.weight.rho.copy_(torch.tensor([[rho_of(0.1), rho_of(0.2)]]))
        layer.bias.mean.zero_()
        layer.bias.rho.fill_(rho_of(0.05))
    values = torch.tensor([[[1.0, 2.0]]])
    mean, variance = layer.output_moments(values)
    assert mean.item() == pytest.approx(-1.5, abs=1e-6)
    assert variance.item() == pytest.approx(0.1725, abs=1e-6)
    draws = Draws(study_keys(1, MANY), weight_keys(0, 0, MANY) if way == "weights" else None)
    with torch.no_grad():
        if way == "weights":
            # All passes at once: MANY products of one row each would take a minute.
            drawn = (layer.weight.sample(draws.weight) * values).sum(-1) + layer.bias.sample(draws.weight)
        else:
            drawn = layer(values, draws)
    assert drawn.mean().item() == pytest.approx(-1.5, abs=5 * math.sqrt(0.1725 / MANY))
    assert drawn.var().item() == pytest.approx(0.1725, rel=5 * math.sqrt(2 / MANY))


@every_layer
@pytest.mark.parametrize("way", ["local", "weights"])
def test_every_place_is_distributed_as_the_closed_form_says(kind: str, way: str) -> None:
    layer, values = layers()[kind]
    passes = 2000
    with torch.no_grad():
        mean, variance = (value[0] for value in layer.output_moments(values))
        drawn = layer(values, Draws(study_keys(2, passes), weight_keys(1, 0, passes) if way == "weights" else None))
    error = (drawn.mean(0) - mean) / (variance / passes).sqrt()
    ratio = drawn.var(0) / variance
    # The largest of at most 360 normal numbers, and of as many chi-squared ones.
    assert error.abs().max() < 5
    assert (ratio - 1).abs().max() < 6 * math.sqrt(2 / passes)


@every_layer
def test_a_sampled_weight_is_one_linear_map_for_every_study_and_place(kind: str) -> None:
    layer, values = layers()[kind]
    keys = weight_keys(0, 3, 4)
    draws = Draws(study_keys(2, 4), keys)
    with torch.no_grad():
        whole = layer(values, draws)
        doubled = layer(2 * values, draws)
        bias = layer(torch.zeros_like(values), draws)
        alone = layer(values[:, 1:], Draws(study_keys(1, 4, seed=9), keys))
    torch.testing.assert_close(doubled - bias, 2 * (whole - bias), atol=2e-5, rtol=1e-4)
    # Neither the study's own key nor the rest of the batch plays a part.
    torch.testing.assert_close(alone, whole[:, 1:], atol=1e-6, rtol=1e-5)


def test_places_of_an_image_share_sampled_weights_but_not_local_draws() -> None:
    """What local reparameterisation of a convolution gives up: in an even image all inner places are the same function of w."""
    layer, passes = layers()["conv2d"][0], 500
    even = torch.ones(1, 1, 2, 6, 6)
    with torch.no_grad():
        sampled = layer(even, Draws(study_keys(1, passes), weight_keys(0, 0, passes)))[:, 0, 0, 1:-1, 1:-1].flatten(1)
        local = layer(even, Draws(study_keys(1, passes)))[:, 0, 0, 1:-1, 1:-1].flatten(1)
    assert torch.corrcoef(sampled.T)[0, -1].item() > 0.999
    assert abs(torch.corrcoef(local.T)[0, -1].item()) < 5 / math.sqrt(passes)


@every_layer
def test_local_draws_belong_to_the_study_the_pass_the_epoch_and_the_layer(kind: str) -> None:
    layer, values = layers()[kind]
    with torch.no_grad():
        whole = layer(values, Draws(study_keys(2, 3)))
        alone = layer(values[:, 1:], Draws(study_keys(2, 3)[:, 1:]))
        later = layer(values, Draws(study_keys(2, 3, epoch=1)))
        more = layer(values, Draws(study_keys(2, 5)))
        layer.stream = noise.chain("variational", "another")
        other = layer(values, Draws(study_keys(2, 3)))
    torch.testing.assert_close(alone, whole[:, 1:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(more[:3], whole, atol=1e-6, rtol=1e-5)
    assert len({float(drawn.sum()) for drawn in (whole[0], whole[1], later[0], other[0])}) == 4


def test_sampled_weights_change_with_step_pass_and_seed_and_stay_over_the_epoch() -> None:
    weight = layers()["linear"][0].weight
    first, again = weight.sample(weight_keys(0, 5, 2)), weight.sample(weight_keys(0, 5, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    for keys in (weight_keys(0, 6, 2), weight_keys(1, 5, 2), weight_keys(0, None, 2)):
        assert not torch.equal(first, weight.sample(keys))


@every_layer
@pytest.mark.parametrize("way", ["local", "weights"])
def test_without_variance_a_layer_is_the_deterministic_one(kind: str, way: str) -> None:
    layer, values = layers()[kind]
    with torch.no_grad():
        layer.weight.rho.fill_(-20)
        layer.bias.rho.fill_(-20)
        drawn = layer(values, Draws(study_keys(2, 3), weight_keys(0, 0, 3) if way == "weights" else None))
        expected = layer.map(values[0], layer.weight.mean, layer.bias.mean).expand_as(drawn)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)


@every_layer
def test_gradients_are_finite_and_reach_mean_and_rho_even_where_the_input_is_zero(kind: str) -> None:
    layer, values = layers()[kind]
    with torch.no_grad():
        layer.weight.rho.fill_(-20)
        layer.bias.rho.fill_(-20)
    values = values.clone()
    values[0, 0] = 0
    layer(values, Draws(study_keys(2, 2))).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_both_ways_estimate_the_same_gradient() -> None:
    """Of E[(w x - 1)^2] by mu and sigma, which is known: 2 (mu x - 1) x and 2 sigma x^2."""
    passes, x = 20_000, 1.5
    expected = (2 * (0.4 * x - 1) * x, 2 * 0.3 * x**2)
    for way in ("local", "weights"):
        layer = VariationalLinear(1, 1, bias=False)
        name_draws(layer)
        with torch.no_grad():
            layer.weight.mean.fill_(0.4)
            layer.weight.rho.fill_(rho_of(0.3))
        keys = weight_keys(2, 0, passes)
        values = torch.full((1, 1, 1), x)
        drawn = layer(values, Draws(study_keys(1, passes))) if way == "local" else layer.weight.sample(keys) * x
        (drawn - 1).square().mean().backward()
        assert layer.weight.mean.grad.item() == pytest.approx(expected[0], abs=0.05)
        assert layer.weight.rho.grad.item() == pytest.approx(expected[1] * torch.sigmoid(layer.weight.rho).item(), abs=0.02)


@pytest.mark.parametrize("cut", [(8,), (3, 5), (1, 0, 7)])
def test_divergence_counts_the_same_however_rows_are_cut(cut: tuple[int, ...]) -> None:
    """Rule D8, in value and gradient: each part (rank or micro-batch) is divided by the weight of the whole batch."""
    layer = layers()["linear"][0]
    weight = torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1])
    gaussian_kl(posterior_moments(layer), prior_sigma=0.1).backward()
    expected = layer.weight.rho.grad.clone()
    divergence = gaussian_kl(posterior_moments(layer), prior_sigma=0.1).item()
    layer.zero_grad()
    parts = weight.split(cut)
    terms = [kl_term(posterior_moments(layer).expand(len(part), -1), part, prior_sigma=0.1, scale=1.0) for part in parts]
    total = sum(term.weight.item() for term in terms)
    loss = sum((term.numerator / total for term in terms), torch.zeros(()))
    assert loss.item() == pytest.approx(divergence, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(layer.weight.rho.grad, expected, rtol=1e-5, atol=1e-6)


def test_the_divergence_comes_in_evenly_over_the_first_fifth_of_the_steps() -> None:
    assert [kl_warmup(step, 50, 0.2) for step in (0, 4, 9, 10, 49)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    assert kl_warmup(0, 50, 0.0) == 1.0
