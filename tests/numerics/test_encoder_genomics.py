"""Self-normalisation: what alpha dropout, SELU and LeCun's start keep at mean 0 and variance 1."""

import pytest
import torch
from model_inputs import variables
from torch import Tensor, nn
from torch.nn import functional

from draf_dist import noise
from draf_dist.models.encoders.genomics import GenomicsConfig, GenomicsEncoder, lecun_linear
from draf_dist.models.mc import SELU_FLOOR, MCAlphaDropout, MCDropout, name_streams
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.modality import TableSpec


def keys_of(passes: int, rows: int) -> Tensor:
    return noise.sample_keys(0, "model", None, torch.arange(rows), passes)


def alpha_dropout(probability: float) -> MCAlphaDropout:
    dropout = MCAlphaDropout(probability)
    name_streams(nn.Sequential(dropout))
    return dropout


def test_the_floor_is_that_of_selu() -> None:
    assert functional.selu(torch.tensor(-1e4, dtype=torch.float64)).item() == pytest.approx(SELU_FLOOR, abs=1e-12)


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5])
def test_mean_and_variance_are_kept(probability: float) -> None:
    values = noise.normal(torch.arange(50), (4000,)).unsqueeze(0)
    dropped = alpha_dropout(probability)(values, keys_of(1, 50))
    # The standard deviations of both estimates are about 1 / sqrt(200,000) = .0022, and .0032.
    assert dropped.mean().item() == pytest.approx(0, abs=0.012)
    assert dropped.var().item() == pytest.approx(1, abs=0.016)


def test_a_dropped_element_has_the_value_of_the_closed_form() -> None:
    # p = .5: a = (.5 + f^2 .25)^(-1/2), b = -a .5 f, so a dropped one is a f / 2, and one kept at 2 is 2 a - a f / 2.
    scale = (0.5 + 0.25 * SELU_FLOOR**2) ** -0.5
    dropped = alpha_dropout(0.5)(torch.full((1, 10, 100), 2.0), keys_of(1, 10))
    expected = {round(scale * SELU_FLOOR / 2, 5), round(2 * scale - scale * SELU_FLOOR / 2, 5)}
    assert {round(value, 5) for value in dropped.unique().tolist()} == expected


def test_it_drops_what_plain_dropout_of_the_same_name_drops() -> None:
    plain, alpha = MCDropout(0.3), MCAlphaDropout(0.3)
    values, keys = torch.full((1, 6, 40), 0.5), keys_of(3, 6)
    assert torch.equal(plain(values, keys) == 0, alpha(values, keys) < -1)


def test_without_dropout_nothing_changes_and_evaluation_is_like_training() -> None:
    values, keys = torch.randn(1, 4, 10), keys_of(3, 4)
    assert alpha_dropout(0.0)(values, keys) is values
    dropout = alpha_dropout(0.3)
    assert torch.equal(dropout.eval()(values, keys), dropout.train()(values, keys))


def deep(layers: int) -> GenomicsEncoder:
    torch.manual_seed(0)
    encoder = GenomicsConfig(layers=layers).build(TableSpec(name="genes", variables=variables(1000)), 16)
    name_streams(encoder)
    return encoder


def inputs_of_projection(encoder: GenomicsEncoder, table: SeriesInput) -> Tensor:
    seen: list[Tensor] = []
    encoder.projection.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    encoder(table, keys_of(2, table.values.shape[0]))
    return seen[0]


def measured(rows: int) -> SeriesInput:
    values = noise.normal(torch.arange(rows), (1, 1000))
    return SeriesInput(values, torch.ones_like(values, dtype=torch.bool), torch.ones(rows, dtype=torch.int64))


def test_sixteen_layers_keep_mean_and_variance_where_relu_loses_them() -> None:
    hidden = inputs_of_projection(deep(16), measured(64))
    assert hidden.mean().item() == pytest.approx(0, abs=0.05)
    assert hidden.var().item() == pytest.approx(1, abs=0.05)
    torch.manual_seed(0)
    relu = nn.Sequential(*[part for _ in range(16) for part in (lecun_linear(256, 256), nn.ReLU())])
    assert relu(torch.randn(64, 256)).var() < 1e-4


def test_starting_weights_keep_the_variance() -> None:
    torch.manual_seed(0)
    layer = lecun_linear(1000, 500)
    assert layer.weight.var().item() == pytest.approx(1e-3, rel=0.02)
    assert not layer.bias.any()


def test_a_gene_that_was_not_observed_enters_as_its_mean_until_something_was_learned() -> None:
    encoder, table = deep(2), measured(4)
    observed = table.observed.clone()
    observed[:, :, 3] = False
    zeroed = table.values.masked_fill(~observed, 0.0)
    known, unknown = (SeriesInput(zeroed, seen, table.length) for seen in (table.observed, observed))
    keys = keys_of(2, 4)
    assert torch.equal(encoder(known, keys), encoder(unknown, keys))
    with torch.no_grad():
        encoder.unobserved.weight.add_(0.1)
    assert not torch.equal(encoder(known, keys), encoder(unknown, keys))
    encoder(unknown, keys).square().mul(torch.linspace(0, 1, 16)).sum().backward()
    gradient = encoder.unobserved.weight.grad
    assert gradient is not None
    assert gradient[:, 3].any()
    assert not gradient[:, 4].any()
