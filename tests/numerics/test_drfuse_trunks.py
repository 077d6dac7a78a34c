"""The published encoders of DrFuse, against other implementations of their parts and the rules of every model (spec 4.6)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema, with_absent_slots
from monai.networks.nets.resnet import ResNet, ResNetBottleneck
from torch import Tensor, nn

from draf_dist.errors import SpecError
from draf_dist.models.build import build_model
from draf_dist.models.drfuse_trunks import PostNormLayer, SeriesTrunk, TrunksConfig
from draf_dist.models.fusion.drfuse import DrfuseConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.models.mc import name_streams
from draf_dist.objectives.drfuse import DrfuseObjectiveConfig
from draf_dist.schema.batch import Batch, SeriesInput
from draf_dist.schema.modality import DataSchema, ImageSpec

SMALL = TrunksConfig(heads=2, feed_forward=12, blocks=(1, 2), channels=4)
ALL = small_schema(3)
SCHEMA = ALL.model_copy(update={"modalities": ALL.modalities[:2]})


def batch_of(schema: DataSchema, rows: int = 8) -> Batch:
    return small_batch(schema, rows)


def model_of() -> nn.Module:
    """With every parameter moved, so that every path carries weight."""
    model = build_model(DrfuseConfig(width=8, trunks=SMALL), SCHEMA, seed=2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_a_layer_is_torchs_encoder_layer_without_its_dropout() -> None:
    torch.manual_seed(0)
    ours = PostNormLayer(SMALL.model_copy(update={"dropout": 0.0}), 8)
    theirs = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    parts = {
        "self_attn.in_proj_": "queries_keys_values.",
        "self_attn.out_proj.": "output.",
        "linear1.": "expand.",
        "linear2.": "contract.",
    }
    state = theirs.state_dict()
    for old, new in parts.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    ours.load_state_dict(state)
    tokens, attended = torch.randn(3, 5, 8), torch.arange(5) < torch.tensor([[5], [2], [1]])
    found = ours(tokens.unsqueeze(0), attended, torch.zeros(1, 3, dtype=torch.int64))[0]
    expected = theirs(tokens, src_key_padding_mask=~attended)
    torch.testing.assert_close(found[attended], expected[attended], rtol=1e-5, atol=1e-5)


def test_either_end_reads_what_they_have_in_common_and_means_over_the_steps_that_count() -> None:
    torch.manual_seed(0)
    trunk = SeriesTrunk(SMALL.model_copy(update={"dropout": 0.0}), SCHEMA.modalities[1], 8)  # type: ignore[arg-type]
    keys = torch.zeros(1, 1, dtype=torch.int64)
    values, observed = torch.randn(1, 5, 3), torch.rand(1, 5, 3) < 0.7
    found = trunk(SeriesInput(values, observed, torch.tensor([4])), keys)
    tokens = trunk.embedding(torch.cat([values, observed.float()], dim=-1)[:, :4]) + trunk.positions[:4]
    whole = torch.ones(1, 4, dtype=torch.bool)
    common = trunk.common(tokens.unsqueeze(0), whole, keys)
    for features, end in zip(found, (trunk.shared, trunk.distinct), strict=True):
        torch.testing.assert_close(features, end(common, whole, keys).mean(2), rtol=1e-5, atol=1e-5)


def test_an_image_trunk_is_a_residual_network_with_two_ends() -> None:
    """MONAI's, with GroupNorm and our parameters in their order."""
    config = TrunksConfig(blocks=(1, 2, 1, 1), channels=8)
    trunk = config.build(ImageSpec(name="cxr", channels=3, height=64, width=64), 5)
    image = torch.randn(2, 3, 64, 64)
    ends = trunk(image, torch.zeros(1, 2, dtype=torch.int64))
    for name, found in zip(("shared", "distinct"), ends, strict=True):
        stages, output = getattr(trunk, name), getattr(trunk, f"{name}_output")
        torch.testing.assert_close(found[0], theirs(trunk, stages, output, config)(image), rtol=1e-5, atol=1e-5)


def theirs(trunk: Any, stages: nn.Module, output: nn.Module, config: TrunksConfig) -> nn.Module:
    """MONAI's network with the stem, stages and last layer of ours."""
    net = ResNet(
        ResNetBottleneck,
        list(config.blocks),
        [config.channels * 2**stage for stage in range(4)],
        spatial_dims=2,
        n_input_channels=3,
        conv1_t_size=7,
        conv1_t_stride=2,
        num_classes=5,
        bias_downsample=False,
    )
    for module in list(net.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(min(32, norm.num_features), norm.num_features))
    ours: list[Tensor] = [p for part in (trunk.stem, trunk.norm, stages, output) for p in part.parameters()]
    with torch.no_grad():
        for mine, other in zip(ours, net.parameters(), strict=True):
            other.copy_(mine)
    return net


@pytest.mark.parametrize("filler", [float("nan"), 1e6])
def test_what_an_absent_slot_holds_changes_neither_outputs_nor_gradients(filler: float) -> None:
    batch = batch_of(SCHEMA)
    found = [outcome(model_of(), each) for each in (batch, with_absent_slots(batch, filler))]
    assert all(tensor.isfinite().all() for tensor in found[0])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def outcome(model: nn.Module, batch: Batch) -> list[Tensor]:
    keys = pass_keys(batch)
    terms = DrfuseObjectiveConfig().build()(model, batch, keys)
    torch.stack([term.scale * term.numerator for term in terms.values()]).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    return [model(batch, keys).logits.detach(), *(gradient for gradient in gradients if gradient is not None)]


def test_a_study_gets_the_same_output_in_any_batch() -> None:
    batch, model = batch_of(SCHEMA), model_of()
    keys = pass_keys(batch)
    parts = [model(batch.rows(a, b), keys[:, a:b]).logits for a, b in ((0, 3), (3, 8))]
    torch.testing.assert_close(model(batch, keys).logits, torch.cat(parts, dim=1), rtol=1e-6, atol=1e-6)


def test_nothing_present_gives_finite_gradients() -> None:
    batch, model = batch_of(SCHEMA), model_of()
    batch = replace(batch, present=torch.zeros_like(batch.present))
    terms = DrfuseObjectiveConfig(jsd="published").build()(model, batch, pass_keys(batch))
    torch.stack([term.numerator for term in terms.values()]).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_dropout_is_in_the_layers_of_series_alone() -> None:
    model = build_model(DrfuseConfig(width=8, trunks=SMALL), SCHEMA, seed=2)
    name_streams(model)
    batch = batch_of(SCHEMA)
    features = model.encoders(replace(batch, present=torch.ones_like(batch.present)), pass_keys(batch))  # type: ignore[operator]
    for part in features:
        image, series = part.unbind(2)
        assert torch.equal(image[0], image[1])
        assert not torch.isclose(series[0], series[1]).any(1).all()


def test_a_table_has_no_published_encoder() -> None:
    with pytest.raises(SpecError, match="labs: expected a modality of kind image or series, found table"):
        DrfuseConfig(trunks=SMALL).build(ALL)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(SpecError, match="heads: expected a divisor of width 9, found 2"):
        DrfuseConfig(width=9, trunks=SMALL).build(SCHEMA)


def test_the_objective_is_for_drfuse_alone() -> None:
    batch = batch_of(ALL)
    model = build_model(MeanConfig(width=8, encoders=SMALL_ENCODERS), ALL, seed=0)
    with pytest.raises(SpecError, match="expected model.kind drfuse"):
        DrfuseObjectiveConfig().build()(model, batch, pass_keys(batch))
