"""Activation checkpointing keeps less between forward and backward, and finds the blocks by itself."""

import pytest
import torch
from model_inputs import pass_keys, small_batch
from torch import Tensor, nn

from draf_dist.models.build import build_model
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, ImageSpec, SeriesSpec, VariableSpec
from draf_dist.training.activation_checkpointing import checkpoint_activations

# An image and a day of vital signs, in the sizes of jobs/finetune_synth.yaml; encoders as they are by default.
SCHEMA = DataSchema(
    modalities=(
        ImageSpec(name="cxr", channels=1, height=64, width=64),
        SeriesSpec(
            name="vitals", variables=tuple(VariableSpec(name=f"v{i}", unit="1") for i in range(6)), num_steps=24, step_h=1.0
        ),
    ),
    label=LabelSpec(name="death", classes=("no", "yes")),
    sites=("north",),
)


def kept_bytes(model: nn.Module) -> int:
    """What lies between the forward and the backward of a step, besides the parameters."""
    seen: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    batch = small_batch(SCHEMA, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        terms = FusionObjectiveConfig().build()(model, batch, pass_keys(batch, 4))
    torch.stack([term.numerator for term in terms.values()]).sum().backward()
    return sum(seen.values())


def test_a_third_of_the_activations_is_kept() -> None:
    """Of the default encoders, 4 passes of dropout: what a step keeps falls to less than a third."""
    plain, forgetful = (build_model(DrafConfig(), SCHEMA, seed=1) for _ in range(2))
    checkpoint_activations(forgetful)
    before, after = kept_bytes(plain), kept_bytes(forgetful)
    assert after < before / 3
    for left, right in zip(plain.parameters(), forgetful.parameters(), strict=True):
        assert left.grad is not None
        assert right.grad is not None
        assert torch.equal(left.grad, right.grad)


def test_parameters_keep_their_names() -> None:
    plain, forgetful = (build_model(DrafConfig(), SCHEMA, seed=1) for _ in range(2))
    checkpoint_activations(forgetful)
    assert list(forgetful.state_dict()) == list(plain.state_dict())


def test_without_gradients_nothing_is_computed_twice() -> None:
    model = build_model(DrafConfig(), SCHEMA, seed=1)
    checkpoint_activations(model)
    batch = small_batch(SCHEMA, 2)
    with torch.no_grad():
        found = model(batch, pass_keys(batch, 2))
    assert torch.equal(found.logits, build_model(DrafConfig(), SCHEMA, seed=1)(batch, pass_keys(batch, 2)).logits)


def test_a_block_with_running_statistics_is_refused() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

        def checkpointed_blocks(self) -> tuple[nn.Module, ...]:
            return (self.block,)

    with pytest.raises(ValueError, match="Sequential"):
        checkpoint_activations(Moving())
