"""What every encoder must hold: a new member of the union inherits these tests by standing in it."""

from typing import Any, get_args

import pytest
import torch
from model_inputs import pass_keys, small_batch, small_schema
from torch import Tensor, nn

from draf_dist.errors import SpecError
from draf_dist.models.absent import clear_absent
from draf_dist.models.encoders import EncoderChoice, EncoderConfig, Image2dConfig, SeriesTransformerConfig, TabularConfig
from draf_dist.models.mc import MCDropout, name_streams
from draf_dist.schema.batch import ModalityInput, SeriesInput
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, TableSpec

SCHEMA = small_schema()
SPEC_OF_KIND = {spec.kind: spec for spec in SCHEMA.modalities}
READS = {Image2dConfig: "image", SeriesTransformerConfig: "series", TabularConfig: "table"}
CONFIGS = [member() for member in get_args(get_args(EncoderConfig)[0])]
every_encoder = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
WIDTH = 16


def built(config: Any) -> tuple[nn.Module, ModalityInput, Tensor]:
    """An encoder of width 16, an input of 8 rows and keys of 4 passes."""
    torch.manual_seed(0)
    spec = SPEC_OF_KIND[READS[type(config)]]
    encoder = config.build(spec, WIDTH)
    name_streams(encoder)
    batch = small_batch(SCHEMA)
    return encoder, clear_absent(batch)[spec.name], pass_keys(batch)


def rows_of(value: ModalityInput, start: int, stop: int) -> ModalityInput:
    if isinstance(value, Tensor):
        return value[start:stop]
    return SeriesInput(value.values[start:stop], value.observed[start:stop], value.length[start:stop])


@every_encoder
def test_features_are_normalised_per_pass_and_study(config: Any) -> None:
    encoder, value, keys = built(config)
    features = encoder(value, keys)
    assert features.shape == (4, 8, WIDTH)
    torch.testing.assert_close(features.mean(-1), torch.zeros(4, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(-1, correction=0), torch.ones(4, 8), atol=1e-2, rtol=0)


@every_encoder
def test_a_study_is_encoded_alike_in_any_batch(config: Any) -> None:
    encoder, value, keys = built(config)
    parts = [encoder(rows_of(value, a, b), keys[:, a:b]) for a, b in ((0, 3), (3, 8))]
    torch.testing.assert_close(encoder(value, keys), torch.cat(parts, dim=1), atol=1e-6, rtol=1e-6)


@every_encoder
def test_passes_can_be_drawn_one_by_one(config: Any) -> None:
    encoder, value, keys = built(config)
    one_by_one = torch.cat([encoder(value, keys[index : index + 1]) for index in range(4)])
    torch.testing.assert_close(encoder(value, keys), one_by_one, atol=1e-6, rtol=1e-6)


@every_encoder
def test_what_comes_before_the_first_dropout_is_computed_once(config: Any) -> None:
    encoder, value, keys = built(config)
    shapes: list[int] = []
    first = next(module for module in encoder.modules() if isinstance(module, MCDropout))
    first.register_forward_pre_hook(lambda _module, arguments: shapes.append(arguments[0].shape[0]))
    encoder(value, keys)
    assert shapes[0] == 1


@every_encoder
def test_passes_differ_in_evaluation_and_agree_without_dropout(config: Any) -> None:
    encoder, value, keys = built(config)
    features = encoder.eval()(value, keys)
    assert not torch.equal(features[0], features[1])
    still, value, keys = built(config.model_copy(update={"dropout": 0.0, "projection_dropout": 0.0}))
    features = still(value, keys)
    assert features.shape == (4, 8, WIDTH)
    assert torch.equal(features[0], features[3])


@every_encoder
def test_every_parameter_receives_a_gradient(config: Any) -> None:
    encoder, value, keys = built(config)
    (encoder(value, keys) * torch.randn(WIDTH)).sum().backward()
    assert not [name for name, parameter in encoder.named_parameters() if parameter.grad is None or not parameter.grad.any()]


@every_encoder
def test_a_modality_of_another_kind_is_refused(config: Any) -> None:
    for spec in SCHEMA.modalities:
        if spec.kind != READS[type(config)]:
            with pytest.raises(SpecError, match=f"expected a modality of kind {READS[type(config)]}"):
                config.build(spec, WIDTH)


@every_encoder
def test_full_size_counts_cost_nothing_on_the_meta_device(config: Any) -> None:
    with torch.device("meta"):
        encoder = config.build(SPEC_OF_KIND[READS[type(config)]], 128)
    assert all(parameter.is_meta for parameter in encoder.parameters())


def test_default_choice_has_an_encoder_for_every_kind_of_modality() -> None:
    choice = EncoderChoice()
    kinds: dict[type[ModalitySpec], str] = {ImageSpec: "image2d", SeriesSpec: "series_transformer", TableSpec: "tabular"}
    for spec in SCHEMA.modalities:
        assert choice.of(spec).kind == kinds[type(spec)]


def test_an_override_by_name_wins_over_the_kind() -> None:
    wide = TabularConfig(hidden=256)
    choice = EncoderChoice(by_name={"labs": wide})
    schema = DataSchema(
        modalities=(TableSpec(name="labs", variables=()), TableSpec(name="history", variables=())), label=SCHEMA.label, sites=()
    )
    assert [choice.of(spec) for spec in schema.modalities] == [wide, TabularConfig()]


def test_heads_must_divide_the_hidden_width() -> None:
    with pytest.raises(ValueError, match="not a multiple of heads"):
        SeriesTransformerConfig(hidden=10, heads=4)


def test_steps_past_the_length_change_nothing_and_steps_before_it_do() -> None:
    encoder, value, keys = built(SeriesTransformerConfig())
    assert isinstance(value, SeriesInput)
    length = torch.full((8,), 3)
    observed = torch.ones_like(value.observed)
    features = encoder(SeriesInput(value.values, observed, length), keys)
    past, before = value.values.clone(), value.values.clone()
    past[:, 3:] += 5
    before[:, 2] += 5
    assert torch.equal(features, encoder(SeriesInput(past, observed, length), keys))
    assert not torch.equal(features, encoder(SeriesInput(before, observed, length), keys))


def test_a_series_without_a_step_gives_finite_features_and_gradients() -> None:
    encoder, value, keys = built(SeriesTransformerConfig())
    assert isinstance(value, SeriesInput)
    empty = SeriesInput(torch.zeros_like(value.values), torch.zeros_like(value.observed), torch.zeros_like(value.length))
    features = encoder(empty, keys)
    features.square().sum().backward()
    assert features.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_a_code_that_was_not_observed_differs_from_one_that_is_zero() -> None:
    encoder, value, keys = built(TabularConfig())
    assert isinstance(value, SeriesInput)
    zeros = torch.zeros_like(value.values)
    known = SeriesInput(zeros, torch.ones_like(value.observed), value.length)
    unknown = SeriesInput(zeros, torch.zeros_like(value.observed), value.length)
    assert not torch.equal(encoder(known, keys), encoder(unknown, keys))
