"""BatchNorm over weighted rows is torch's where weights are equal, and a plain weighted mean and variance where they are not."""

import pytest
import torch
from torch import Tensor, nn

from draf_dist.models.norm import BatchNorm, RowNorm

TORCHS = {(): nn.BatchNorm1d, (5,): nn.BatchNorm1d, (4, 3): nn.BatchNorm2d, (2, 3, 2): nn.BatchNorm3d}
CHANNELS, ROWS = 3, 7


def values(shape: tuple[int, ...], rows: int = ROWS, seed: int = 0) -> Tensor:
    """Channels of other means and scales."""
    drawn = torch.randn(rows, CHANNELS, *shape, generator=torch.Generator().manual_seed(seed))
    channel = torch.arange(CHANNELS).view(1, -1, *[1] * len(shape))
    return drawn * (1 + channel) + 10 * channel


def parameters(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.weight.copy_(torch.tensor([1.5, -0.5, 2.0]))
        module.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
    return module


def gradients(module: nn.Module, given: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    given = given.clone().requires_grad_()
    output = module(given, *others)
    cotangent = torch.sin(torch.arange(output.numel())).view(output.shape)
    return (output.detach(), *torch.autograd.grad((output * cotangent).sum(), [given, module.weight, module.bias]))


@pytest.mark.parametrize("shape", TORCHS)
@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equal_weights_give_torchs_in_value_gradient_and_running_statistics(
    shape: tuple[int, ...], weight: float, dtype: torch.dtype, tolerance: float
) -> None:
    """In f32 both round: the error is of the size of the largest number that goes in."""
    theirs, ours = (parameters(module).to(dtype) for module in (TORCHS[shape](CHANNELS), BatchNorm(CHANNELS)))
    for seed in range(3):
        batch = values(shape, seed=seed).to(dtype)
        expected, found = gradients(theirs, batch), gradients(ours, batch, torch.full((ROWS,), weight))
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=tolerance * float(batch.abs().max()))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=tolerance, atol=tolerance)
    batch = values(shape, seed=9).to(dtype)
    expected, found = theirs.eval()(batch), ours.eval()(batch, torch.ones(ROWS))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(batch.abs().max()))


def test_momentum_and_eps_mean_what_they_mean_in_torch() -> None:
    theirs, ours = nn.BatchNorm2d(CHANNELS, momentum=0.01, eps=1e-3), BatchNorm(CHANNELS, momentum=0.01, eps=1e-3)
    batch = 0.01 * values((4, 3))
    torch.testing.assert_close(ours(batch, torch.ones(ROWS)), theirs(batch), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-6, atol=1e-6)


def test_a_weight_of_two_is_the_row_twice() -> None:
    batch = values((4, 3)).double()
    weight = torch.tensor([1.0, 2, 1, 1, 2, 1, 1])
    twice = batch.repeat_interleave(weight.long(), dim=0)
    left, right = BatchNorm(CHANNELS).double(), BatchNorm(CHANNELS).double()
    expected = right(twice, torch.ones(len(twice)))
    torch.testing.assert_close(left(batch, weight).repeat_interleave(weight.long(), dim=0), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left.running_mean, right.running_mean)


@pytest.mark.parametrize("filler", [0.0, 1e6, float("nan"), float("inf")])
def test_rows_of_weight_zero_have_no_part_in_it(filler: float) -> None:
    batch = values((4, 3))
    weight = torch.tensor([1.0, 0, 1, 1, 0, 1, 1])
    alone, among = parameters(BatchNorm(CHANNELS)), parameters(BatchNorm(CHANNELS))
    expected = alone(batch[weight > 0], torch.ones(5))
    given = torch.where(weight.view(-1, 1, 1, 1) > 0, batch, filler).requires_grad_()
    found = among(given, weight)
    torch.testing.assert_close(found[weight > 0], expected, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(among.running_var, alone.running_var)
    found[weight > 0].square().sum().backward()
    assert torch.isfinite(among.weight.grad).all()
    assert (given.grad[weight == 0] == 0).all()


def test_the_gradient_is_that_of_finite_differences() -> None:
    norm = parameters(BatchNorm(CHANNELS)).double()
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    given = values((2,), rows=5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: norm(x, weight), (given,))


def test_values_far_from_zero_keep_their_variance() -> None:
    """In f32 the difference of E x^2 and (E x)^2 would be nothing but rounding here."""
    batch = 1e4 + values((16, 16))
    expected = batch.double().var((0, 2, 3), correction=0).float()
    norm = BatchNorm(CHANNELS, momentum=1.0)
    norm(batch, torch.ones(ROWS))
    count = ROWS * 256
    torch.testing.assert_close(norm.running_var * (count - 1) / count, expected, rtol=1e-3, atol=0)


def test_what_has_no_variance_leaves_the_running_statistics_alone() -> None:
    norm = parameters(BatchNorm(CHANNELS))
    nothing_counted = norm(values((4,)), torch.zeros(ROWS))
    one_value = norm(values((1,)), torch.tensor([0.1, 0, 0, 0, 0, 0, 0]))
    no_rows = norm(values((4,), rows=0), torch.zeros(0))
    for output in (nothing_counted, one_value, no_rows):
        assert torch.isfinite(output).all()
    assert torch.equal(norm.running_mean, torch.zeros(CHANNELS))
    assert torch.equal(norm.running_var, torch.ones(CHANNELS))


def test_a_row_depends_on_the_others_in_training_and_on_none_in_evaluation() -> None:
    norm = BatchNorm(CHANNELS)
    batch, weight = values((4, 3)), torch.ones(ROWS)
    assert not torch.allclose(norm(batch, weight)[:3], norm(batch[:3], weight[:3]))
    norm.eval()
    assert torch.equal(norm(batch, weight)[:3], norm(batch[:3], weight[:3]))


def test_statistics_are_in_f32_whatever_the_activations_are() -> None:
    norm = BatchNorm(CHANNELS)
    found = norm(values((16, 16)).bfloat16(), torch.ones(ROWS))
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(CHANNELS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (31, 1), (32, 2), (50, 2), (64, 4), (128, 8), (512, 8), (7, 1)])
def test_row_norm_is_group_norm_with_at_least_sixteen_channels_a_group(channels: int, groups: int) -> None:
    batch = torch.randn(5, channels, 3, 2, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.group_norm(batch, groups)
    norm = RowNorm(channels)
    torch.testing.assert_close(norm(batch, torch.ones(5)), expected)
    assert torch.equal(norm(batch, torch.zeros(5)), norm(batch, torch.ones(5)))
