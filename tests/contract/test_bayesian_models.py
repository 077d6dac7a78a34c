"""What every form of the Bayesian U-Net must hold: each kind of task, 2-D and 3-D, Gaussian and point weights (rules I1, D1-D9)."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from bayesian_inputs import DEATH, FINDINGS, MASK, SIDE_OF, disc_batch, model_keys, schema_of
from torch import Tensor, nn

from draf_dist.errors import SpecError
from draf_dist.models.encoders.image2d import Image2dConfig
from draf_dist.models.encoders.volume3d import Volume3dConfig
from draf_dist.models.link import link_of
from draf_dist.models.mc import MCDropout
from draf_dist.models.segmentation import BayesianUnet, BayesianUnetConfig
from draf_dist.models.streamed import streamed
from draf_dist.models.variational import GaussianWeight, VariationalLayer, weight_keys
from draf_dist.objectives.bayesian import BayesianObjectiveConfig
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.label import SegmentationSpec
from draf_dist.schema.modality import DataSchema
from draf_dist.training.activation_checkpointing import checkpoint_activations
from draf_dist.training.bf16 import compute_in_bf16

SMALL: dict[str, Any] = {"widths": (4, 6), "groups": 2}
SIDE = {2: 12, 3: 8}
FORMS = {
    "mask 2-D": (MASK, 2, {}),
    "mask 3-D": (MASK, 3, {}),
    "class 2-D": (SIDE_OF, 2, {}),
    "class 3-D": (SIDE_OF, 3, {}),
    "labels": (FINDINGS, 2, {}),
    "survival": (DEATH, 2, {}),
    "several heads": (MASK, 2, {"heads": {"side": SIDE_OF, "findings": FINDINGS}}),
    "mask beside a class": (SIDE_OF, 2, {"heads": {"organ": MASK}}),
    "MC dropout": (MASK, 2, {"weights": "point", "dropout": 0.2}),
    "deterministic": (SIDE_OF, 2, {"weights": "point"}),
    "Gaussian and dropout": (MASK, 2, {"dropout": 0.2}),
}
every_form = pytest.mark.parametrize("form", FORMS)


def schema_for(form: str) -> DataSchema:
    task, dimensions, _ = FORMS[form]
    return schema_of(task, dimensions, SIDE[dimensions])


def ready(form: str) -> BayesianUnet:
    """A model whose parameters are moved, so that every path carries weight."""
    torch.manual_seed(3)
    model = BayesianUnetConfig(**SMALL, **FORMS[form][2]).build(schema_for(form))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_for(form: str) -> Batch:
    batch = disc_batch(schema_for(form))
    others = {name: disc_batch(schema_of(task)).target for name, task in FORMS[form][2].get("heads", {}).items()}
    if FORMS[form][0] is SIDE_OF and others:
        others = {"organ": disc_batch(schema_of(MASK, 2, SIDE[2])).target}
    targets: Any = {batch_label(form): batch.target, **others} if others else batch.target
    return replace(batch, target=targets)


def batch_label(form: str) -> str:
    return FORMS[form][0].name


def gradients_of(model: nn.Module, batch: Batch, keys: Tensor) -> dict[str, Tensor]:
    step = BayesianObjectiveConfig().build(modality="scan", num_train=50, num_steps=10, seed=0).at(9)
    terms = step(model, batch, keys)
    loss = sum((term.scale * term.numerator / term.weight.clamp_min(1) for term in terms.values()), torch.zeros(()))
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def tensors_of(output: FusionOutput) -> dict[str, Tensor]:
    """Every tensor of an output with the rows first."""
    found = {"logits": output.logits.transpose(0, 1), "reliability": output.reliability, "features": output.features}
    for group in ("uncertainty", "parts", "signals"):
        found |= {f"{group}.{name}": value for name, value in getattr(output, group).items()}
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.isfinite(tensor).all(), name
        torch.testing.assert_close(
            tensor, right[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@every_form
def test_shapes_are_those_of_the_contract(form: str) -> None:
    model, batch = ready(form), batch_for(form)
    output = model(batch, model_keys(batch, 3))
    task = FORMS[form][0]
    space = batch.inputs["scan"].shape[2:]
    assert output.logits.shape == (3, 6, len(task.outputs), *(space if isinstance(task, SegmentationSpec) else ()))
    assert output.reliability.shape == (6, 2)
    assert output.features.shape == (6, 2, 4 + 4 + 6)
    assert output.parts["attention"].shape == output.parts["epistemic_map"].shape == (6, *space)
    assert output.parts["posterior"].shape == (6, 4)
    assert set(output.uncertainty) == {"epistemic", "aleatoric", "total", "entropy", "mi"}
    for name, value in output.uncertainty.items():
        assert value.shape == (6, 2), name
        assert (value[~batch.present] == 0).all()
        # The table is not read.
        assert (value[:, 1] == 0).all()
    torch.testing.assert_close(output.parts["attention"].flatten(1).sum(1), torch.ones(6))
    assert not output.parts["epistemic_map"].requires_grad
    assert all(not value.requires_grad and value.shape == (6,) for value in output.signals.values())
    assert all(getattr(output, field.name) is not None for field in fields(output) if field.name in ("logits", "features"))


@every_form
@pytest.mark.parametrize("filler", [float("nan"), 1e6])
def test_what_an_absent_slot_holds_changes_neither_outputs_nor_gradients(form: str, filler: float) -> None:
    batch = batch_for(form)
    keys = model_keys(batch)
    absent = ~batch.present[:, 0].view(-1, *[1] * (batch.inputs["scan"].dim() - 1))
    other = replace(batch, inputs={**batch.inputs, "scan": torch.where(absent, filler, batch.inputs["scan"])})
    assert absent.any()
    assert_same(tensors_of(ready(form)(batch, keys)), tensors_of(ready(form)(other, keys)))
    assert_same(gradients_of(ready(form), batch, keys), gradients_of(ready(form), other, keys))


@every_form
def test_every_parameter_receives_a_gradient(form: str) -> None:
    model, batch = ready(form), batch_for(form)
    gradients = gradients_of(model, batch, model_keys(batch))
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    idle = [name for name, gradient in gradients.items() if not gradient.any()]
    assert not idle


@every_form
@pytest.mark.parametrize("way", ["local", "weights"])
def test_a_study_gets_the_same_output_in_any_batch_and_order(form: str, way: str) -> None:
    model, batch = ready(form), batch_for(form)
    keys = model_keys(batch)
    chosen = [weight_keys(0, 2, 2)] if way == "weights" else []
    whole = tensors_of(model(batch, keys, *chosen))
    parts = [tensors_of(model(batch.rows(a, b), keys[:, a:b], *chosen)) for a, b in ((0, 2), (2, 6))]
    assert_same(whole, {name: torch.cat([part[name] for part in parts]) for name in whole}, tolerance=2e-5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = tensors_of(model(batch.map(lambda tensor: tensor[order]), keys[:, order], *chosen))
    assert_same(shuffled, {name: tensor[order] for name, tensor in whole.items()}, tolerance=2e-5)


@every_form
def test_padding_rows_change_no_gradient(form: str) -> None:
    batch = batch_for(form)
    padded = replace(batch, weight=(torch.arange(6) < 4).float())
    keys = model_keys(padded)
    whole = gradients_of(ready(form), padded, keys)
    assert_same(whole, gradients_of(ready(form), padded.rows(0, 4), keys[:, :4]), tolerance=1e-5)


@every_form
def test_equal_keys_give_equal_bits_in_training_and_evaluation_and_passes_differ(form: str) -> None:
    model, batch = ready(form), batch_for(form)
    draws = form != "deterministic"
    for chosen in ([], [weight_keys(0, 2, 2)]):
        first, again = model.train()(batch, model_keys(batch), *chosen), model.eval()(batch, model_keys(batch), *chosen)
        assert_same(tensors_of(first), tensors_of(again))
        assert torch.equal(first.logits[0], first.logits[1]) is not draws
    other = model(batch, model_keys(batch, seed=1)).logits
    assert torch.equal(other, model(batch, model_keys(batch)).logits) is not draws


@every_form
def test_every_draw_has_a_stream_of_its_own_and_no_layer_is_one_of_torchs_that_draw(form: str) -> None:
    modules = list(ready(form).modules())
    streams = [m.stream for m in modules if isinstance(m, VariationalLayer | GaussianWeight | MCDropout)]
    assert len(streams) == len(set(streams))
    forbidden = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    assert not [module for module in modules if isinstance(module, forbidden)]


@every_form
def test_passes_one_by_one_are_those_at_once_and_give_the_same_uncertainty(form: str) -> None:
    model, batch = ready(form), batch_for(form)
    keys = model_keys(batch, 5)
    for chosen in ([], [weight_keys(0, None, 5)]):
        output = model(batch, keys, *chosen)
        parts = list(model.passes(batch, keys, *chosen))
        torch.testing.assert_close(torch.stack(parts), output.logits, rtol=1e-5, atol=1e-5)
        found = streamed(model.passes(batch, keys, *chosen), link_of(FORMS[form][0])).uncertainties()
        measured = found["epistemic"].reshape(6, -1).mean(1) * batch.present[:, 0]
        torch.testing.assert_close(output.uncertainty["epistemic"][:, 0], measured, rtol=1e-4, atol=1e-6)


@every_form
def test_starting_parameters_follow_from_the_seed_alone_and_survive_a_state_dict(form: str) -> None:
    def made(seed: int) -> BayesianUnet:
        torch.manual_seed(seed)
        return BayesianUnetConfig(**SMALL, **FORMS[form][2]).build(schema_for(form))

    first, again, other = made(1), made(1), made(2)
    assert_same(first.state_dict(), again.state_dict())
    other.load_state_dict(first.state_dict())
    batch = batch_for(form)
    keys = model_keys(batch)
    assert_same(tensors_of(first(batch, keys)), tensors_of(other(batch, keys)))


@pytest.mark.parametrize("form", ["mask 2-D", "mask 3-D", "class 2-D", "several heads"])
def test_without_variance_the_model_is_the_deterministic_one(form: str) -> None:
    """Rule 2 of spec 3.8: rho -> -20."""
    task, _, options = FORMS[form]
    gaussian = ready(form)
    point = BayesianUnetConfig(**SMALL, **options, weights="point").build(schema_for(form))
    with torch.no_grad():
        for name, parameter in gaussian.named_parameters():
            if name.endswith(".rho"):
                parameter.fill_(-20)
    renamed = gaussian.state_dict()
    for old, new in {".weight.mean": ".layer.weight", ".bias.mean": ".layer.bias"}.items():
        renamed = {name.replace(old, new): value for name, value in renamed.items()}
    point.load_state_dict({name: renamed[name] for name in point.state_dict()})
    batch = batch_for(form)
    keys = model_keys(batch, 3)
    expected = point(batch, keys)
    assert point(batch, keys).parts["posterior"].any().item() is False
    for chosen in ([], [weight_keys(0, 1, 3)]):
        found = gaussian(batch, keys, *chosen)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
        assert found.uncertainty["epistemic"].max() < 1e-9


@pytest.mark.parametrize("form", ["mask 2-D", "class 3-D"])
def test_in_bf16_attention_still_sums_to_one_and_the_divergence_keeps_its_precision(form: str) -> None:
    batch = batch_for(form)
    keys = model_keys(batch)
    model, exact = ready(form), ready(form)(batch, keys)
    compute_in_bf16(model, torch.device("cpu"))
    rough = model(batch, keys)
    torch.testing.assert_close(rough.parts["attention"].flatten(1).sum(1), torch.ones(6))
    torch.testing.assert_close(rough.parts["posterior"], exact.parts["posterior"])
    torch.testing.assert_close(rough.logits, exact.logits, atol=0.1, rtol=0.1)
    assert all(gradient.isfinite().all() for gradient in gradients_of(model, batch, keys).values())


def test_activation_checkpointing_changes_no_gradient() -> None:
    """Rule D9: draws are pure functions of their keys."""
    batch = batch_for("mask 2-D")
    keys = model_keys(batch)
    plain = gradients_of(ready("mask 2-D"), batch, keys)
    model = ready("mask 2-D")
    checkpoint_activations(model)
    assert_same(gradients_of(model, batch, keys), plain, tolerance=1e-7)


@pytest.mark.parametrize(("form", "kind"), [("mask 2-D", Image2dConfig), ("mask 3-D", Volume3dConfig)])
def test_a_pre_trained_encoder_is_taken_over_map_by_map(form: str, kind: Any) -> None:
    encoder = kind(widths=SMALL["widths"], groups=SMALL["groups"], dropout=0.0).build(schema_for(form).modalities[0], 8)
    model, batch = ready(form), batch_for(form)
    model.start_encoder(encoder.state_dict())
    image = torch.where(batch.present[:, 0].view(-1, *[1] * (batch.inputs["scan"].dim() - 1)), batch.inputs["scan"], 0.0)
    hidden = torch.relu(encoder.norm(encoder.stem(image)))
    for block, features in zip(encoder.blocks, model.encode(batch).features, strict=True):
        hidden = block(hidden)
        assert torch.equal(hidden, features)


def test_an_encoder_of_other_widths_is_refused() -> None:
    schema = schema_for("mask 2-D")
    for widths in ((4, 8), (4,), (4, 6, 8)):
        state = Image2dConfig(widths=widths, groups=2).build(schema.modalities[0], 8).state_dict()
        with pytest.raises(SpecError, match="pretrained encoder: expected that of this model"):
            ready("mask 2-D").start_encoder(state)


def test_the_modality_is_that_of_the_masks_or_must_be_said() -> None:
    assert BayesianUnetConfig().image_of(schema_of(MASK, annotated=True)).name == "scan"
    assert BayesianUnetConfig(modality="expert").image_of(schema_of(SIDE_OF, annotated=True)).name == "expert"
    for config, found in ((BayesianUnetConfig(), "none"), (BayesianUnetConfig(modality="labs"), "'labs'")):
        with pytest.raises(SpecError, match=f"model.modality: expected an image .*found {found}. Known: scan, expert, body"):
            config.image_of(schema_of(SIDE_OF, annotated=True))
    with pytest.raises(SpecError, match="masks of organ: expected masks of expert, found scan"):
        BayesianUnetConfig(modality="expert").build(schema_of(MASK, annotated=True))
    with pytest.raises(SpecError, match="model.heads: expected other names, found 'side'"):
        BayesianUnetConfig(heads={"side": SIDE_OF}).build(schema_of(SIDE_OF))


def test_gaussian_weights_double_the_parameters_of_decoder_and_heads() -> None:
    """Counted on the meta device at the default size."""
    with torch.device("meta"):
        schema = schema_of(MASK, 3, 64)
        gaussian, point = (BayesianUnetConfig(weights=kind).build(schema) for kind in ("gaussian", "point"))

    def count(model: BayesianUnet, *, draws: bool) -> int:
        named = ((name, p.numel()) for name, p in model.named_parameters() if name.startswith(("decoder", "heads")))
        return sum(number for name, number in named if ("norm" not in name) is draws)

    # 27 ((64 + 32) 32 + (32 + 16) 16 + (16 + 1) 16) of the decoder, 16 * 2 + 2 of the head.
    assert count(point, draws=True) == 27 * (96 * 32 + 48 * 16 + 17 * 16) + 34
    assert count(gaussian, draws=True) == 2 * count(point, draws=True)
    assert count(gaussian, draws=False) == count(point, draws=False)
