"""FGSM and PGD against what they do to a logistic model (O10), and the weights of attacked rows (spec 3.5, 3.8)."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from draf_dist import noise
from draf_dist.objectives.adversarial import AdversarialConfig, Box, fgsm, gradient_sign, pgd, uncertainty_weights, valid_box

W = torch.tensor([1.0, -2.0])


def logistic(image: Tensor) -> Tensor:
    """-log p(y = 1) of images (B, 1, 1, 2)."""
    return -functional.logsigmoid((image.flatten(1) * W).sum(1))


def box(*pixels: float, epsilon: float = 0.1, low: float = -10.0, high: float = 10.0) -> Box:
    def bound(value: float) -> Tensor:
        return torch.full((1, 1, 1, 1), value)

    return Box(torch.tensor(pixels).view(1, 1, 1, 2), bound(epsilon), bound(low), bound(high))


def keys(*number: int) -> Tensor:
    return noise.hash64(5, torch.tensor(number))


def pixels(image: Tensor) -> list[float]:
    return image.flatten().tolist()


def test_the_gradient_of_the_logistic_model_is_that_of_the_oracle() -> None:
    image = torch.tensor([0.5, 0.25]).view(1, 1, 1, 2).requires_grad_()
    loss = logistic(image)
    assert torch.exp(-loss).item() == pytest.approx(0.5)
    loss.sum().backward()
    assert pixels(image.grad) == pytest.approx([-0.5, 1.0])


def test_fgsm_goes_to_the_corner_of_the_oracle() -> None:
    found = fgsm(logistic, box(0.5, 0.25))
    assert pixels(found) == pytest.approx([0.4, 0.35], abs=1e-6)
    assert torch.exp(-logistic(found)).item() == pytest.approx(0.4255575, abs=1e-6)


@pytest.mark.parametrize("number", range(20))
def test_pgd_ends_at_the_same_corner_from_any_start(number: int) -> None:
    """5 steps of .04: the box is .2 wide, so the far side is reached from anywhere."""
    found = pgd(logistic, box(0.5, 0.25), keys(number), steps=5, step_size=0.4)
    assert pixels(found) == pytest.approx([0.4, 0.35], abs=1e-6)


def test_the_start_is_random_in_the_box_and_belongs_to_the_study() -> None:
    def still(image: Tensor) -> Tensor:
        return 0 * image.flatten(1).sum(1)

    wide = Box(torch.zeros(500, 1, 1, 2), *[torch.full((500, 1, 1, 1), bound) for bound in (0.1, -1.0, 1.0)])
    study = keys(*range(500))
    found = pgd(still, wide, study, steps=2, step_size=0.25)
    assert found.abs().max() <= 0.1
    assert found.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.05)
    part = Box(*[value[:3] for value in (wide.clean, wide.radius, wide.low, wide.high)])
    assert torch.equal(pgd(still, part, study[:3], steps=2, step_size=0.25), found[:3])


def test_an_attack_stays_within_epsilon_and_within_the_range_of_the_image() -> None:
    image = torch.randn(4, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    image[3] = 0.7
    limits = valid_box(image, 0.05)
    flat = image.flatten(1)
    torch.testing.assert_close(limits.radius.flatten(), 0.05 * (flat.amax(1) - flat.amin(1)))

    def upwards(values: Tensor) -> Tensor:
        return values.flatten(1).sum(1)

    for found in (fgsm(upwards, limits), pgd(upwards, limits, keys(0, 1, 2, 3), steps=8, step_size=0.25)):
        raised = torch.minimum(image + limits.radius, flat.amax(1).view(-1, 1, 1, 1))
        torch.testing.assert_close(found, raised)
    assert torch.equal(found[3], image[3])


def test_an_attack_raises_the_loss_of_a_network_and_more_steps_raise_it_more() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    image = torch.randn(16, 1, 3, 4)

    def loss(values: Tensor) -> Tensor:
        return -functional.logsigmoid(net(values.flatten(1)).squeeze(1))

    config = AdversarialConfig(epsilon=0.2)
    one = config.model_copy(update={"attack": "fgsm"}).craft(loss, image, keys(*range(16)))
    many = config.craft(loss, image, keys(*range(16)))
    assert (loss(one) > loss(image)).all()
    assert loss(many).mean() > loss(one).mean()


def test_crafting_needs_no_gradients_around_it_and_leaves_none_behind() -> None:
    net = torch.nn.Linear(2, 1)

    def loss(values: Tensor) -> Tensor:
        return net(values.flatten(1)).squeeze(1)

    with torch.no_grad():
        found = fgsm(loss, box(0.5, 0.25))
    assert torch.equal(found, fgsm(loss, box(0.5, 0.25)))
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    assert gradient_sign(loss, box(0.5, 0.25).clean).abs().sum() == 2


def test_rows_are_weighted_by_their_share_of_the_mean_uncertainty_within_limits() -> None:
    uncertainty = torch.tensor([0.1, 0.3, 2.0, 0.0, 9.0])
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    found = uncertainty_weights(uncertainty, weight, lambda values: values)
    # The mean of the four that count is .6.
    assert found[:4].tolist() == pytest.approx([0.5, 0.5, 2.0, 0.5])
    middle = uncertainty_weights(torch.tensor([0.8, 1.0, 1.2]), torch.ones(3), lambda values: values)
    assert middle.tolist() == pytest.approx([0.8, 1.0, 1.2])
    assert uncertainty_weights(torch.zeros(3), torch.ones(3), lambda values: values).tolist() == [1, 1, 1]


def test_the_mean_uncertainty_is_that_of_all_ranks() -> None:
    uncertainty, weight = torch.tensor([0.8, 1.0, 1.2, 1.0]), torch.ones(4)
    whole = uncertainty_weights(uncertainty, weight, lambda values: values)

    def summed(_: Tensor) -> Tensor:
        return torch.stack([(weight * uncertainty).sum(), weight.sum()]).double()

    parts = [uncertainty_weights(uncertainty[cut], weight[cut], summed) for cut in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not uncertainty_weights(uncertainty.requires_grad_(), weight, lambda values: values).requires_grad
