"""What every encoder must hold: a new member of the union inherits these tests by standing in it."""

from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema, variables
from torch import Tensor, nn

from draf_dist.errors import SpecError
from draf_dist.models.absent import clear_absent
from draf_dist.models.build import build_model
from draf_dist.models.encoders import (
    EncoderChoice,
    EncoderConfig,
    GenomicsConfig,
    GruConfig,
    Image2dConfig,
    MonaiConfig,
    PatchBagConfig,
    SeriesTransformerConfig,
    TabularConfig,
    Volume3dConfig,
)
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.mc import MCDropout, name_streams
from draf_dist.schema.batch import Batch, ModalityInput, SeriesInput
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, TableSpec, VolumeSpec
from draf_dist.training.activation_checkpointing import checkpoint_activations

SCHEMA = small_schema()
VOLUME = VolumeSpec(name="ct", channels=2, spacing_mm=(2, 1, 1), patch=(8, 10, 12), chunk=(8, 8, 8))
LARGE_IMAGE = ImageSpec(name="film", channels=1, height=36, width=32)
CODED = TableSpec(
    name="history", variables=(*variables(2), *(variable.model_copy(update={"type": "binary"}) for variable in variables(4)[2:]))
)
SPECS: tuple[ModalitySpec, ...] = (*SCHEMA.modalities, VOLUME)
SPEC_OF_KIND = {spec.kind: spec for spec in SPECS}
READS: dict[type[Any], tuple[str, ...]] = {
    Image2dConfig: ("image",),
    Volume3dConfig: ("volume",),
    MonaiConfig: ("volume", "image"),
    SeriesTransformerConfig: ("series",),
    GruConfig: ("series",),
    PatchBagConfig: ("series",),
    TabularConfig: ("table",),
    GenomicsConfig: ("table",),
}
CONFIGS = [member() for member in get_args(get_args(EncoderConfig)[0])]
WIDTH = 16


@dataclass(frozen=True)
class Case:
    """An encoder and what it reads."""

    config: Any
    spec: ModalitySpec

    @property
    def tolerance(self) -> float:
        """Of rows in batches of other sizes. 121 layers add up what each product rounds otherwise."""
        return 1e-5 if isinstance(self.config, MonaiConfig) else 1e-6

    @property
    def name(self) -> str:
        options = "".join(f"-{value}" for value in self.config.model_dump(exclude_defaults=True).values() if isinstance(value, str))
        return f"{self.config.kind}{options}-{self.spec.name}"


CASES = [
    *(Case(config, SPEC_OF_KIND[kind]) for config in CONFIGS for kind in READS[type(config)]),
    Case(MonaiConfig(network="resnet18", norm="instance"), LARGE_IMAGE),
    Case(MonaiConfig(network="densenet121"), LARGE_IMAGE),
    Case(TabularConfig(codes={"v2": 2, "v3": 2}, embedding=3), CODED),
]
every_encoder = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)


def batch_of(schema: DataSchema) -> Batch:
    """8 normalised rows of which about a third of the modalities is absent."""
    flat = tuple(
        ImageSpec(name=spec.name, height=8, width=8) if isinstance(spec, VolumeSpec) else spec for spec in schema.modalities
    )
    batch = small_batch(schema.model_copy(update={"modalities": flat}))
    generator = torch.Generator().manual_seed(1)
    volumes = {
        spec.name: torch.randn(8, spec.channels, *spec.delivered, generator=generator)
        for spec in schema.modalities
        if isinstance(spec, VolumeSpec)
    }
    return replace(batch, inputs=batch.inputs | volumes)


def values_of(spec: ModalitySpec) -> ModalityInput:
    """8 rows of a modality, some of them absent."""
    batch = batch_of(SCHEMA.model_copy(update={"modalities": (spec, *SCHEMA.modalities[1:])}))
    value = clear_absent(batch)[spec.name]
    if spec is CODED:
        assert isinstance(value, SeriesInput)
        codes = (value.values[..., 2:] > 0).float()
        return replace(value, values=torch.cat([value.values[..., :2], codes], dim=-1))
    return value


def built(config: Any, spec: ModalitySpec | None = None) -> tuple[nn.Module, ModalityInput, Tensor]:
    """An encoder of width 16, an input of 8 rows and keys of 4 passes."""
    torch.manual_seed(0)
    spec = SPEC_OF_KIND[READS[type(config)][0]] if spec is None else spec
    encoder = config.build(spec, WIDTH)
    name_streams(encoder)
    return encoder, values_of(spec), pass_keys(small_batch(SCHEMA))


def rows_of(value: ModalityInput, start: int, stop: int) -> ModalityInput:
    if isinstance(value, Tensor):
        return value[start:stop]
    return SeriesInput(value.values[start:stop], value.observed[start:stop], value.length[start:stop])


@every_encoder
def test_features_are_normalised_per_pass_and_study(case: Case) -> None:
    encoder, value, keys = built(case.config, case.spec)
    features = encoder(value, keys)
    assert features.shape == (4, 8, WIDTH)
    torch.testing.assert_close(features.mean(-1), torch.zeros(4, 8), atol=1e-5, rtol=0)
    # An absent image has the features of the biases, whose variance is not far above the 1e-5 that LayerNorm adds.
    seen = (value if isinstance(value, Tensor) else value.values).flatten(1).any(1)
    variance = features.var(-1, correction=0)[:, seen]
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-2, rtol=0)


@every_encoder
def test_a_study_is_encoded_alike_in_any_batch(case: Case) -> None:
    encoder, value, keys = built(case.config, case.spec)
    parts = [encoder(rows_of(value, a, b), keys[:, a:b]) for a, b in ((0, 3), (3, 8))]
    torch.testing.assert_close(encoder(value, keys), torch.cat(parts, dim=1), atol=case.tolerance, rtol=case.tolerance)


@every_encoder
def test_passes_can_be_drawn_one_by_one(case: Case) -> None:
    encoder, value, keys = built(case.config, case.spec)
    one_by_one = torch.cat([encoder(value, keys[index : index + 1]) for index in range(4)])
    torch.testing.assert_close(encoder(value, keys), one_by_one, atol=case.tolerance, rtol=case.tolerance)


@every_encoder
def test_what_comes_before_the_first_dropout_is_computed_once(case: Case) -> None:
    encoder, value, keys = built(case.config, case.spec)
    shapes: list[int] = []
    first = next(module for module in encoder.modules() if isinstance(module, MCDropout))
    first.register_forward_pre_hook(lambda _module, arguments: shapes.append(arguments[0].shape[0]))
    encoder(value, keys)
    assert shapes[0] == 1


@every_encoder
def test_passes_differ_in_evaluation_and_agree_without_dropout(case: Case) -> None:
    encoder, value, keys = built(case.config, case.spec)
    features = encoder.eval()(value, keys)
    assert not torch.equal(features[0], features[1])
    still, value, keys = built(case.config.model_copy(update={"dropout": 0.0, "projection_dropout": 0.0}), case.spec)
    features = still(value, keys)
    assert features.shape == (4, 8, WIDTH)
    assert torch.equal(features[0], features[3])


@every_encoder
def test_every_parameter_receives_a_gradient(case: Case) -> None:
    encoder, value, keys = built(case.config, case.spec)
    (encoder(value, keys) * torch.randn(WIDTH)).sum().backward()
    assert not [name for name, parameter in encoder.named_parameters() if parameter.grad is None or not parameter.grad.any()]


@every_encoder
def test_forgotten_activations_change_no_gradient(case: Case) -> None:
    gradients = []
    for forget in (False, True):
        encoder, value, keys = built(case.config, case.spec)
        if forget:
            checkpoint_activations(encoder)
        encoder(value, keys).square().mul(torch.linspace(0, 1, WIDTH)).sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


@every_encoder
def test_every_dropout_is_ours_and_no_norm_looks_at_the_batch(case: Case) -> None:
    modules = list(built(case.config, case.spec)[0].modules())
    streams = [module.stream for module in modules if isinstance(module, MCDropout)]
    assert len(streams) == len(set(streams)) >= 2
    forbidden = (
        nn.modules.dropout._DropoutNd,
        nn.MultiheadAttention,
        nn.RNNBase,
        nn.modules.batchnorm._BatchNorm,
        nn.modules.instancenorm._InstanceNorm,
    )
    assert not [module for module in modules if isinstance(module, forbidden)]


@every_config
def test_a_modality_of_another_kind_is_refused(config: Any) -> None:
    kinds = READS[type(config)]
    for spec in SPECS:
        if spec.kind not in kinds:
            with pytest.raises(SpecError, match=f"for {spec.name}: expected a modality of kind .*{kinds[0]}.*, found {spec.kind}"):
                config.build(spec, WIDTH)


@every_encoder
def test_full_size_counts_cost_nothing_on_the_meta_device(case: Case) -> None:
    with torch.device("meta"):
        encoder = case.config.build(case.spec, 128)
    assert all(parameter.is_meta for parameter in encoder.parameters())


def test_default_choice_has_an_encoder_for_every_kind_of_modality() -> None:
    choice = EncoderChoice()
    kinds: dict[type[ModalitySpec], str] = {
        ImageSpec: "image2d",
        VolumeSpec: "volume3d",
        SeriesSpec: "series_transformer",
        TableSpec: "tabular",
    }
    for spec in SPECS:
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


@pytest.mark.parametrize("config", [SeriesTransformerConfig(), GruConfig(), PatchBagConfig()], ids=lambda config: config.kind)
def test_steps_past_the_length_change_nothing_and_steps_before_it_do(config: Any) -> None:
    encoder, value, keys = built(config)
    assert isinstance(value, SeriesInput)
    length = torch.full((8,), 3)
    observed = torch.ones_like(value.observed)
    features = encoder(SeriesInput(value.values, observed, length), keys)
    past, before = value.values.clone(), value.values.clone()
    past[:, 3:] += 5
    before[:, 2] += 5
    assert torch.equal(features, encoder(SeriesInput(past, observed, length), keys))
    assert not torch.equal(features, encoder(SeriesInput(before, observed, length), keys))


@pytest.mark.parametrize("config", [SeriesTransformerConfig(), GruConfig(), PatchBagConfig()], ids=lambda config: config.kind)
def test_a_series_without_a_step_gives_finite_features_and_gradients(config: Any) -> None:
    encoder, value, keys = built(config)
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


def test_a_model_reads_volumes_and_what_an_absent_one_holds_changes_nothing() -> None:
    schema = SCHEMA.model_copy(update={"modalities": (VOLUME, *SCHEMA.modalities[1:])})
    choice = SMALL_ENCODERS.model_copy(update={"volume": Volume3dConfig(widths=(4, 8), groups=2)})
    model = build_model(DrafConfig(width=8, encoders=choice), schema, seed=0)
    batch = batch_of(schema)
    keys = pass_keys(batch, passes=40)
    ct = batch.inputs["ct"]
    assert isinstance(ct, Tensor)
    held = torch.where(batch.present[:, 0].view(-1, 1, 1, 1, 1), ct, float("nan"))
    with torch.no_grad():
        found, again = model(batch, keys), model(replace(batch, inputs=batch.inputs | {"ct": held}), keys)
    assert not batch.present[:, 0].all()
    assert found.logits.isfinite().all()
    assert torch.equal(found.logits, again.logits)
    torch.testing.assert_close(found.logits, model(batch, keys).logits, atol=1e-6, rtol=1e-6)


def test_an_image_encoder_for_a_volume_is_refused() -> None:
    schema = SCHEMA.model_copy(update={"modalities": (VOLUME, *SCHEMA.modalities[1:])})
    choice = EncoderChoice(by_name={"ct": Image2dConfig()})
    with pytest.raises(SpecError, match="image2d for ct: expected a modality of kind image, found volume"):
        build_model(DrafConfig(encoders=choice), schema, seed=0)
