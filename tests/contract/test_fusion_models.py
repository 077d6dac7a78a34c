"""What every fusion model must hold: a new member of the union inherits these tests by standing in it."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from fusion_members import MEMBERS, SMALL, Member, moved, name_of
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema, small_stats, with_absent_slots
from torch import Tensor, nn

from draf_dist.errors import SpecError
from draf_dist.models.build import build_model
from draf_dist.models.export import load_model, save_model
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.models.mc import MCDropout
from draf_dist.schema.batch import Batch, FusionOutput

CONFIGS = [(member, config) for member in SMALL.values() for config in member.configs]
SCHEMA = small_schema(num_classes=3)
every_config = pytest.mark.parametrize("config", [config for _, config in CONFIGS], ids=lambda c: name_of(c))
every_member = pytest.mark.parametrize(("member", "config"), CONFIGS, ids=lambda value: name_of(value))


def test_the_contract_is_asked_of_every_model() -> None:
    assert set(SMALL) == {member.model_fields["kind"].default for member in MEMBERS}


def ready(config: Any, *, training: bool = False) -> nn.Module:
    """A model whose zero-initialised parameters are moved, so that every path carries weight."""
    return moved(build_model(config, SCHEMA, seed=3)).train(training)


def gradients_of(config: Any, batch: Batch, keys: Tensor, *, training: bool = False) -> dict[str, Tensor]:
    """Of what the model is trained with, coupled terms among it."""
    model = ready(config, training=training)
    terms = SMALL[config.kind].objective(model, batch, keys)
    loss = sum((term.scale * term.numerator / term.weight.clamp_min(1) for term in terms.values()), torch.zeros(()))
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


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
    assert_same(gradients_of(config, batch, keys), gradients_of(config, other, keys))


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


@every_member
def test_shapes_are_those_of_the_contract(member: Member, config: Any) -> None:
    batch = small_batch(SCHEMA, rows=5)
    output = ready(config)(batch, pass_keys(batch, passes=3))
    assert output.logits.shape == (3, 5, 3)
    assert output.reliability.shape == (5, 3)
    assert output.features.shape == (5, 3, member.width)
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
    whole = gradients_of(config, padded, keys, training=True)
    alone = gradients_of(config, padded.rows(0, 5), keys[:, :5], training=True)
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
    gradients = gradients_of(config, batch, pass_keys(batch), training=True)
    assert gradients.keys() == {name for name, _ in ready(config).named_parameters()}
    idle = [name for name, gradient in gradients.items() if not gradient.any()]
    assert not idle


@every_member
def test_equal_keys_give_equal_bits_and_other_keys_another_draw(member: Member, config: Any) -> None:
    batch = small_batch(SCHEMA)
    model = ready(config)
    first, again = (tensors_of(model(batch, pass_keys(batch))) for _ in range(2))
    assert_same(first, again)
    other = tensors_of(model(batch, pass_keys(batch, seed=1)))
    assert any(not torch.equal(first[name], other[name]) for name in first) is member.samples


@every_member
def test_passes_differ_in_evaluation_as_in_training(member: Member, config: Any) -> None:
    batch = replace(small_batch(SCHEMA), present=torch.ones(8, 3, dtype=torch.bool))
    model = ready(config).eval()
    logits = model(batch, pass_keys(batch, passes=2)).logits
    assert torch.equal(logits[0], logits[1]) is not (member.samples and varies(config))
    in_training = model.train()(batch, pass_keys(batch, passes=2)).logits
    assert torch.equal(logits, in_training) or not member.same_in_training or getattr(config, "u_ema", None)


def varies(config: Any) -> bool:
    """Literal readings give one point prediction."""
    return getattr(config, "predict", "mc") == "mc" and getattr(config, "combine", "mean") != "vote"


@every_member
def test_every_dropout_has_a_stream_of_its_own_and_none_is_torchs(member: Member, config: Any) -> None:
    modules = list(ready(config).modules())
    streams = [module.stream for module in modules if isinstance(module, MCDropout)]
    assert len(streams) == len(set(streams)) >= int(member.samples)
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
def test_every_parameter_has_an_axis(config: Any) -> None:
    """DeepSpeed can't send another one to the other ranks."""
    assert not [name for name, parameter in ready(config).named_parameters() if parameter.dim() == 0]


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


@pytest.mark.parametrize("member", SMALL.values(), ids=name_of)
@pytest.mark.parametrize("bits", [False, True])
def test_presence_bits_do_nothing_at_the_start_and_something_once_learned(member: Member, bits: bool) -> None:
    batch = small_batch(SCHEMA)
    keys = pass_keys(batch)
    model = build_model(member.config.model_copy(update={"presence_bits": bits}), SCHEMA, seed=3)
    plain = build_model(member.config, SCHEMA, seed=3)
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
    build_model(MeanConfig(encoders=choice), SCHEMA, seed=0)


def test_a_dropout_too_small_to_ever_act_is_refused_at_the_start() -> None:
    # Masks have a resolution of 2**-16.
    table = SMALL_ENCODERS.table.model_copy(update={"dropout": 1e-6, "projection_dropout": 0.0})
    choice = SMALL_ENCODERS.model_copy(update={"table": table})
    with pytest.raises(SpecError, match="encoder of labs: expected Monte-Carlo passes that differ"):
        build_model(DrafConfig(encoders=choice), SCHEMA, seed=0)
