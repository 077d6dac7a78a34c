"""O15 and the facts of spec 4.2."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from torch.nn import functional

from draf_dist.models.build import build_model
from draf_dist.models.fusion.late_mean import LateMean, LateMeanConfig, mean_probability, vote_probability, vote_share
from draf_dist.models.link import Link

P = torch.tensor([[[0.6, 0.4], [0.45, 0.55], [0.3, 0.7]]], dtype=torch.float64)
ALL = torch.ones(1, 3, dtype=torch.bool)
SCHEMA = small_schema()
BATCH = small_batch(SCHEMA)

CLASSES = Link(exclusive=True)


def late(**options: Any) -> LateMean:
    model = build_model(LateMeanConfig(width=8, encoders=SMALL_ENCODERS, **options), SCHEMA, seed=0)
    assert isinstance(model, LateMean)
    return model


def test_mean_and_votes_are_those_of_the_spec() -> None:
    assert mean_probability(P, ALL)[0].tolist() == pytest.approx([0.45, 0.55], abs=1e-7)
    share = vote_share(P, ALL, CLASSES)[0]
    assert share.argmax() == 1
    assert share[1].item() == pytest.approx(2 / 3, abs=1e-7)
    assert vote_probability(P, ALL, CLASSES)[0, 1].item() == pytest.approx(2 / 3, abs=1e-4)


def test_absent_modalities_have_no_vote_and_no_part_in_the_mean() -> None:
    present = torch.tensor([[True, False, True]])
    assert mean_probability(P, present)[0].tolist() == pytest.approx([0.45, 0.55])
    assert vote_share(P, present, CLASSES)[0].tolist() == pytest.approx([0.5, 0.5])


def test_two_that_disagree_are_decided_by_the_mean() -> None:
    first = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    second = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = torch.stack([torch.stack([1 - p, p], dim=-1) for p in (first, second)], dim=1)
    disagree = (first > 0.5) != (second > 0.5)
    both = torch.ones(200, 2, dtype=torch.bool)
    by_vote, by_mean = vote_probability(pairs, both, CLASSES).argmax(-1), mean_probability(pairs, both).argmax(-1)
    assert disagree.any()
    assert torch.equal(by_vote[disagree], by_mean[disagree])


def test_fused_probability_is_the_mean_of_probabilities_not_of_logits() -> None:
    output = late()(BATCH, pass_keys(BATCH))
    assert output.modality_logits is not None
    expected = mean_probability(output.modality_logits.softmax(-1), BATCH.present)
    torch.testing.assert_close(output.logits.softmax(-1), expected)


def test_one_modality_present_gives_its_own_net() -> None:
    batch = replace(BATCH, present=functional.one_hot(torch.arange(8) % 3, 3).bool())
    output = late()(batch, pass_keys(batch))
    assert output.modality_logits is not None
    own = output.modality_logits[:, torch.arange(8), torch.arange(8) % 3]
    torch.testing.assert_close(output.logits.softmax(-1), own.softmax(-1))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_loss_of_one_modality_reaches_no_other_net(axis: int) -> None:
    model = late()
    output = model(replace(BATCH, present=torch.ones(8, 3, dtype=torch.bool)), pass_keys(BATCH))
    functional.cross_entropy(output.modality_logits[:, :, axis].flatten(0, 1), BATCH.target.label.repeat(4)).backward()
    for other, encoder in enumerate(model.backbones.encoders.values()):
        gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
        assert any(gradient.any() for gradient in gradients) == (other == axis)
        assert model.modality_heads.weight.grad[other].any() == (other == axis)


@pytest.mark.parametrize("bits", [False, True])
def test_the_fused_loss_trains_the_presence_bits_at_most(bits: bool) -> None:
    model = late(presence_bits=bits)
    logits = model(BATCH, pass_keys(BATCH)).logits
    assert logits.requires_grad == bits
    if bits:
        logits.square().sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["bits.linear.weight"]
