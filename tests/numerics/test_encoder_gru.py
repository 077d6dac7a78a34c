"""The GRU written out here is the one of torch, and what lies past a series' length is as if it were not there."""

import pytest
import torch
from model_inputs import variables
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.models.encoders.gru import GruConfig, GruEncoder, Recurrence
from draf_dist.models.mc import name_streams
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.modality import SeriesSpec

ROWS, STEPS, VARIABLES = 5, 7, 3


def encoder(**options: float) -> GruEncoder:
    config = GruConfig.model_validate({"hidden": 8, **options})
    torch.manual_seed(0)
    built = config.build(SeriesSpec(name="vitals", variables=variables(VARIABLES), num_steps=STEPS, step_h=1.0), 4)
    name_streams(built)
    return built


def series(length: int = STEPS) -> SeriesInput:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(ROWS, STEPS, VARIABLES, generator=generator)
    observed = torch.rand(values.shape, generator=generator) < 0.8
    return SeriesInput(torch.where(observed, values, 0.0), observed, torch.full((ROWS,), length))


def keys(passes: int) -> Tensor:
    return noise.sample_keys(0, "model", None, torch.arange(ROWS), passes)


def torch_gru(ours: Recurrence) -> nn.GRU:
    """torch's own layer with the same parameters."""
    theirs = nn.GRU(ours.input_weight.shape[1], ours.hidden_weight.shape[1], batch_first=True)
    pairs = {
        "weight_ih_l0": "input_weight",
        "weight_hh_l0": "hidden_weight",
        "bias_ih_l0": "input_bias",
        "bias_hh_l0": "hidden_bias",
    }
    theirs.load_state_dict({theirs_name: getattr(ours, ours_name) for theirs_name, ours_name in pairs.items()})
    return theirs


def test_states_and_gradients_are_those_of_torch() -> None:
    torch.manual_seed(0)
    ours, values = Recurrence(6, 8), torch.randn(ROWS, STEPS, 6)
    theirs = torch_gru(ours)
    states, (expected, _) = ours(values, torch.ones(ROWS, STEPS, dtype=torch.bool)), theirs(values)
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=1e-6)
    states.square().sum().backward()
    expected.square().sum().backward()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, atol=1e-5, rtol=1e-5)


def test_count_is_that_of_the_spec() -> None:
    # GRU(76, 128) of spec 1.2: 38 variables and their 38 observed bits.
    with torch.device("meta"):
        spec = SeriesSpec(name="vitals", variables=variables(38), num_steps=48, step_h=1.0)
        built = GruConfig().build(spec, 128)
    assert sum(parameter.numel() for parameter in built.recurrence.parameters()) == 79_104


@pytest.mark.parametrize("length", [1, 4])
def test_a_longer_grid_changes_nothing(length: int) -> None:
    model, whole = encoder(), series(length)
    cut = SeriesInput(whole.values[:, :length], whole.observed[:, :length], whole.length)
    states = model.recurrence(torch.cat([whole.values, whole.observed.float()], -1), torch.arange(STEPS).expand(ROWS, -1) < length)
    assert torch.equal(states[:, length - 1 :], states[:, length - 1 : length].expand(-1, STEPS - length + 1, -1))
    still = encoder(dropout=0.0)
    torch.testing.assert_close(still(whole, keys(3)), still(cut, keys(3)), atol=1e-6, rtol=1e-6)


def test_a_value_that_was_not_observed_differs_from_one_that_is_zero() -> None:
    model, zeros = encoder(), torch.zeros(ROWS, STEPS, VARIABLES)
    known, unknown = (SeriesInput(zeros, torch.full_like(zeros, bit, dtype=torch.bool), series().length) for bit in (1, 0))
    assert not torch.equal(model(known, keys(1)), model(unknown, keys(1)))


def test_the_order_of_steps_matters() -> None:
    model, given = encoder(dropout=0.0), series()
    turned = SeriesInput(given.values.flip(1), given.observed.flip(1), given.length)
    assert (model(given, keys(1)) - model(turned, keys(1))).abs().max() > 0.01


def test_the_recurrence_runs_once_for_all_passes() -> None:
    model, shapes = encoder(), []
    model.recurrence.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
    assert model(series(), keys(6)).shape == (6, ROWS, 4)
    assert shapes == [(ROWS, STEPS, 8)]
