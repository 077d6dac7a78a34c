"""What every fusion model must hold: a new member of the union inherits these tests by standing in it."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, get_args

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema, small_stats, with_absent_slots
from torch import Tensor, nn

from draf_dist.errors import SpecError
from draf_dist.models.build import build_model
from draf_dist.models.export import load_model, save_model
from draf_dist.models.fusion import FusionConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.late_mean import LateMeanConfig
from draf_dist.models.mc import MCDropout
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.batch import Batch, FusionOutput

MEMBERS = get_args(get_args(FusionConfig)[0])
READINGS: list[dict[str, Any]] = [
    {"uni_head": "shared", "predict": "mean_feature"},
    {"uncertainty": "mi", "presence_bits": True, "acd_gate": 0.5, "modality_prior": True},
    {"uncertainty": "entropy", "u_space": "prior_shifted", "reliability_alpha": 16.0, "detach_r": False},
    {"u_space": "logit", "alpha_mode": "scaled", "kappa": 2.0},
    {"reliability": "inverse", "uncertainty": "total", "detach_r": False},
    {"reliability": "learned", "uncertainty": "aleatoric"},
    {"u_ema": 0.9, "reliability_alpha": 64.0},
]
CONFIGS = [member(width=8, encoders=SMALL_ENCODERS) for member in MEMBERS]
CONFIGS += [member(width=8, encoders=SMALL_ENCODERS, presence_bits=True) for member in MEMBERS]
CONFIGS += [DrafConfig(width=8, encoders=SMALL_ENCODERS, **reading) for reading in READINGS]
CONFIGS += [LateMeanConfig(width=8, encoders=SMALL_ENCODERS, combine="vote")]

SCHEMA = small_schema(num_classes=3)
every_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: c.kind + str(c.model_dump(exclude_defaults=True, exclude={"encoders", "width"}))
)


def ready(config: Any, *, training: bool = False) -> nn.Module:
    """A model whose zero-initialised parameters are moved, so that every path carries weight."""
    model = build_model(config, SCHEMA, seed=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train(training)


def loss_of(model: nn.Module, batch: Batch, keys: Tensor) -> Tensor:
    terms = FusionObjectiveConfig(lambda_acd=0.5).build()(model, batch, keys)
    return sum((term.scale * term.numerator / term.weight for term in terms.values()), torch.zeros(()))


def gradients_of(model: nn.Module, batch: Batch, keys: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, batch, keys).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def tensors_of(output: FusionOutput) -> dict[str, Tensor]:
    """Every tensor of an output with the rows first."""
    rows_first: dict[str, Tensor] = {}
    for field in fields(output):
        value = getattr(output, field.name)
        if isinstance(value, dict):
            rows_first |= {f"{field.name}.{name}": tensor for name, tensor in value.items()}
        elif value is not None:
            rows_first[field.name] = value.transpose(0, 1) if field.name in ("logits", "modality_logits") else value
    return rows_first


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.isfinite(tensor).all(), name
        torch.testing.assert_close(
            tensor, right[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@every_config
@pytest.mark.parametrize("filler", [float("nan"), 1e6, float("inf")])
def test_what_an_absent_slot_holds_changes_neither_outputs_nor_gradients(config: Any, filler: float) -> None:
    batch = small_batch(SCHEMA)
    keys = pass_keys(batch)
    other = with_absent_slots(batch, filler)
    assert_same(tensors_of(ready(config)(batch, keys)), tensors_of(ready(config)(other, keys)))
    assert_same(gradients_of(ready(config), batch, keys), gradients_of(ready(config), other, keys))


@every_config
def test_weights_sum_to_one_over_present_and_are_zero_on_absent(config: Any) -> None:
    batch = small_batch(SCHEMA)
    output = ready(config)(batch, pass_keys(batch))
    torch.testing.assert_close(output.reliability.sum(1), torch.ones(batch.num_rows))
    assert (output.reliability[batch.present] > 0).all()
    assert (output.reliability[~batch.present] == 0).all()
    for name, value in output.uncertainty.items():
        assert (value[~batch.present] == 0).all(), name
    assert (output.features[~batch.present] == 0).all()


@every_config
def test_shapes_are_those_of_the_contract(config: Any) -> None:
    batch = small_batch(SCHEMA, rows=5)
    output = ready(config)(batch, pass_keys(batch, passes=3))
    assert output.logits.shape == (3, 5, 3)
    assert output.reliability.shape == (5, 3)
    assert output.features.shape == (5, 3, 8)
    assert all(value.shape == (5, 3) for value in output.uncertainty.values())
    assert output.corruption_logits is None or output.corruption_logits.shape == (5, 3)
    assert output.modality_logits is None or output.modality_logits.shape == (3, 5, 3, 3)


@every_config
def test_padding_rows_change_neither_the_loss_nor_gradients(config: Any) -> None:
    batch = small_batch(SCHEMA, rows=8)
    padded = replace(
        batch,
        uid=torch.where(torch.arange(8) < 5, batch.uid, -1),
        weight=(torch.arange(8) < 5).float(),
        present=torch.where((torch.arange(8) < 5).unsqueeze(1), batch.present, torch.tensor([True, False, False])),
    )
    keys = pass_keys(padded)
    whole = gradients_of(ready(config, training=True), padded, keys)
    alone = gradients_of(ready(config, training=True), padded.rows(0, 5), keys[:, :5])
    assert_same(whole, alone, tolerance=2e-6)


@every_config
def test_a_study_gets_the_same_output_in_any_batch(config: Any) -> None:
    """8 = 3 + 5, to 1e-6: matrix products of other sizes may round otherwise in the last bit; the masks are the same exactly."""
    batch = small_batch(SCHEMA)
    keys = pass_keys(batch)
    model = ready(config)
    whole = tensors_of(model(batch, keys))
    parts = [tensors_of(model(batch.rows(a, b), keys[:, a:b])) for a, b in ((0, 3), (3, 8))]
    assert_same(whole, {name: torch.cat([part[name] for part in parts]) for name in whole}, tolerance=1e-6)


@every_config
def test_the_order_of_studies_does_not_matter(config: Any) -> None:
    batch = small_batch(SCHEMA)
    keys = pass_keys(batch)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    model = ready(config)
    shuffled = tensors_of(model(batch.map(lambda tensor: tensor[order]), keys[:, order]))
    assert_same(shuffled, {name: tensor[order] for name, tensor in tensors_of(model(batch, keys)).items()}, tolerance=1e-6)


@every_config
def test_passes_without_gradients_equal_those_with(config: Any) -> None:
    """Without gradients the passes go in parts; with 40 passes of 8 rows there are two."""
    batch = small_batch(SCHEMA)
    keys = pass_keys(batch, passes=40)
    model = ready(config)
    with torch.no_grad():
        parts = tensors_of(model(batch, keys))
    assert_same(parts, tensors_of(model(batch, keys)), tolerance=1e-6)


@every_config
def test_every_parameter_receives_a_gradient(config: Any) -> None:
    batch = small_batch(SCHEMA)
    model = ready(config, training=True)
    gradients = gradients_of(model, batch, pass_keys(batch))
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    idle = [name for name, gradient in gradients.items() if not gradient.any()]
    assert not idle


@every_config
def test_equal_keys_give_equal_bits_and_other_keys_another_draw(config: Any) -> None:
    batch = small_batch(SCHEMA)
    model = ready(config)
    first, again = (tensors_of(model(batch, pass_keys(batch))) for _ in range(2))
    assert_same(first, again)
    other = tensors_of(model(batch, pass_keys(batch, seed=1)))
    assert not torch.equal(first["features"], other["features"])


@every_config
def test_dropout_is_on_in_evaluation_too(config: Any) -> None:
    batch = replace(small_batch(SCHEMA), present=torch.ones(8, 3, dtype=torch.bool))
    model = ready(config).eval()
    features = model.backbones(batch, pass_keys(batch, passes=2))
    for axis, name in enumerate(SCHEMA.names):
        assert not torch.equal(features[0, :, axis], features[1, :, axis]), name
    assert torch.equal(features, model.train().backbones(batch, pass_keys(batch, passes=2)))


@every_config
def test_every_dropout_has_a_stream_of_its_own_and_none_is_torchs(config: Any) -> None:
    modules = list(ready(config).modules())
    streams = [module.stream for module in modules if isinstance(module, MCDropout)]
    assert len(streams) == len(set(streams)) > 0
    forbidden = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase, nn.modules.batchnorm._BatchNorm)
    assert not [module for module in modules if isinstance(module, forbidden)]


@every_config
def test_a_model_survives_its_export_bit_for_bit(config: Any, tmp_path: Any) -> None:
    batch = small_batch(SCHEMA)
    model = ready(config)
    save_model(tmp_path, model, config, SCHEMA, small_stats())
    loaded = load_model(tmp_path)
    assert (loaded.config, loaded.schema, loaded.stats) == (config, SCHEMA, small_stats())
    assert_same(tensors_of(model(batch, pass_keys(batch))), tensors_of(loaded.model.eval()(batch, pass_keys(batch))))


@every_config
def test_starting_parameters_follow_from_the_seed_alone(config: Any) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = build_model(config, SCHEMA, seed=5).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert_same(first, build_model(config, SCHEMA, seed=5).state_dict())
    other = build_model(config, SCHEMA, seed=6).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("bits", [False, True])
def test_presence_bits_do_nothing_at_the_start_and_something_once_learned(member: Callable[..., Any], bits: bool) -> None:
    batch = small_batch(SCHEMA)
    keys = pass_keys(batch)
    model = build_model(member(width=8, encoders=SMALL_ENCODERS, presence_bits=bits), SCHEMA, seed=3)
    plain = build_model(member(width=8, encoders=SMALL_ENCODERS), SCHEMA, seed=3)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert (len(missing), unexpected) == (int(bits), [])
    assert torch.equal(model(batch, keys).logits, plain(batch, keys).logits)
    if bits:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            parameters[missing[0]].add_(0.5)
        assert not torch.equal(model(batch, keys).logits, plain(batch, keys).logits)


def test_an_encoder_for_an_unknown_modality_is_refused_with_the_nearest_name() -> None:
    choice = SMALL_ENCODERS.model_copy(update={"by_name": {"vital": SMALL_ENCODERS.series}})
    with pytest.raises(SpecError, match="Did you mean 'vitals'"):
        DrafConfig(encoders=choice).build(SCHEMA)


def test_an_encoder_of_the_wrong_kind_is_refused() -> None:
    choice = SMALL_ENCODERS.model_copy(update={"by_name": {"labs": SMALL_ENCODERS.image}})
    with pytest.raises(SpecError, match="image2d for labs: expected a modality of kind image, found table"):
        DrafConfig(encoders=choice).build(SCHEMA)


def test_draf_without_dropout_is_refused_but_a_deterministic_mean_is_not() -> None:
    table = SMALL_ENCODERS.table.model_copy(update={"dropout": 0.0, "projection_dropout": 0.0})
    choice = SMALL_ENCODERS.model_copy(update={"table": table})
    with pytest.raises(SpecError, match="encoder of labs: expected MC dropout, found none"):
        DrafConfig(encoders=choice).build(SCHEMA)
    build_model(next(m for m in MEMBERS if m().kind == "mean")(encoders=choice), SCHEMA, seed=0)


def test_a_dropout_too_small_to_ever_act_is_refused_at_the_start() -> None:
    # Masks have a resolution of 2**-16.
    table = SMALL_ENCODERS.table.model_copy(update={"dropout": 1e-6, "projection_dropout": 0.0})
    choice = SMALL_ENCODERS.model_copy(update={"table": table})
    with pytest.raises(SpecError, match="encoder of labs: expected Monte-Carlo passes that differ"):
        build_model(DrafConfig(encoders=choice), SCHEMA, seed=0)
