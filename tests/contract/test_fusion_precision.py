"""What every fusion model must hold in half precision: parameters in f32, products in bf16, results as in f32 but for rounding."""

from typing import Any

import pytest
import torch
from fusion_members import SMALL, Member, moved, name_of
from model_inputs import pass_keys, small_batch, small_schema, with_absent_slots
from torch import Tensor, nn

from draf_dist.models.build import build_model
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.link import Link
from draf_dist.training.bf16 import compute_in_bf16

SCHEMA = small_schema(num_classes=3)
BATCH = small_batch(SCHEMA)
KEYS = pass_keys(BATCH)
CONFIGS = [(member, config) for member in SMALL.values() for config in member.configs]
every_member = pytest.mark.parametrize(("member", "config"), CONFIGS, ids=lambda value: name_of(value))


def ready(config: Any, *, half: bool) -> nn.Module:
    model = moved(build_model(config, SCHEMA, seed=3))
    if half:
        compute_in_bf16(model, torch.device("cpu"))
    return model.eval()


def loss_of(member: Member, model: nn.Module) -> Tensor:
    terms = member.objective(model.train(), BATCH, KEYS)
    return sum((term.scale * term.numerator / term.weight.clamp_min(1) for term in terms.values()), torch.zeros(()))


@every_member
def test_in_bf16_it_is_the_same_model_but_for_rounding(member: Member, config: Any) -> None:
    whole, half = (ready(config, half=half) for half in (False, True))
    expected, found = whole(BATCH, KEYS), half(BATCH, KEYS)
    assert not torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.05, atol=0.05)
    torch.testing.assert_close(found.reliability, expected.reliability, rtol=0.05, atol=0.01)
    for name, value in expected.uncertainty.items():
        assert (found.uncertainty[name] - value).abs().max() <= 0.05 * value.abs().max(), name
    # Weights are weights in any precision.
    torch.testing.assert_close(found.reliability.sum(1), torch.ones(BATCH.num_rows), rtol=0, atol=1e-5)
    assert (found.reliability[~BATCH.present] == 0).all()
    everything = [found.logits, found.features, *found.uncertainty.values(), *found.signals.values()]
    assert all(value.dtype is torch.float32 and value.isfinite().all() for value in everything)


@every_member
def test_in_bf16_every_parameter_has_a_finite_gradient_in_f32(member: Member, config: Any) -> None:
    whole, half = (ready(config, half=half) for half in (False, True))
    loss = loss_of(member, half)
    loss.backward()
    assert loss.item() == pytest.approx(loss_of(member, whole).item(), rel=0.02)
    for name, parameter in half.named_parameters():
        assert parameter.dtype is torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_member
def test_in_bf16_absent_slots_change_nothing_either(member: Member, config: Any) -> None:
    model = ready(config, half=True)
    first, second = model(BATCH, KEYS), model(with_absent_slots(BATCH, float("nan")), KEYS)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.reliability, second.reliability)


def test_uncertainties_of_half_precision_logits_are_computed_in_f32() -> None:
    """Passes that differ by a hundredth: of probabilities that are rounded first, next to nothing would be left of the mi."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(1, 50, 3, generator=generator) + 0.05 * torch.randn(8, 50, 3, generator=generator)).bfloat16()
    for link in (Link(exclusive=True), Link(exclusive=False)):
        expected = link.uncertainties(logits.float())
        assert all(torch.equal(value, expected[name]) for name, value in link.uncertainties(logits).items())
        for space in ("probability", "logit", "prior_shifted"):
            prior = torch.zeros(3)
            wide = link.uncertainty(space, "epistemic", logits.float(), prior)
            assert torch.equal(link.uncertainty(space, "epistemic", logits, prior), wide)


def test_the_literal_heads_uncertainty_keeps_its_digits_in_bf16() -> None:
    """The shared head gives logits in half precision, of which the mutual information is a small difference."""
    config = DrafConfig.model_validate(SMALL["draf"].config.model_dump() | {"uni_head": "shared", "uncertainty": "mi"})
    whole, half = (ready(config, half=half)(BATCH, KEYS).uncertainty["used"] for half in (False, True))
    assert (half - whole).abs().max() < 0.05 * whole.max()
