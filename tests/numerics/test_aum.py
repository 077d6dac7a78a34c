"""AUM: counts, attention, what is missing, the draw of z, stage 1, dropped edges."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from torch import nn

from draf_dist import noise
from draf_dist.models.build import build_model
from draf_dist.models.fusion.aum import Aum, AumConfig, dropped, readings
from draf_dist.models.gaussian import Gaussian
from draf_dist.objectives.aum import AumObjectiveConfig
from draf_dist.schema.batch import Batch
from draf_dist.schema.label import MultiLabelSpec

SCHEMA = small_schema()
BATCH = small_batch(SCHEMA)
KEYS = pass_keys(BATCH)
WIDTH = 8


def small_aum(**options: Any) -> Aum:
    config = AumConfig.model_validate({"width": WIDTH, "encoders": SMALL_ENCODERS, **options})
    model = build_model(config, SCHEMA, seed=3)
    assert isinstance(model, Aum)
    return model.eval()


def moved(model: Aum, scale: float = 0.5) -> Aum:
    """With variances that differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.gaussians.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


# Counts.


def count(*parts: nn.Module) -> int:
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


@pytest.mark.parametrize(("layers", "expected"), [(2, 214_402), (3, 329_474)])
def test_the_block_has_the_parameters_of_muse(layers: int, expected: int) -> None:
    schema = small_schema().model_copy(update={"label": MultiLabelSpec(name="death", labels=("death",))})
    with torch.device("meta"):
        model = AumConfig(width=128, num_layers=layers).build(schema)
    assert count(model.graph, model.head, model.contrast) == expected
    # 66,048 a modality.
    assert count(model.gaussians) == 3 * 66_048
    assert count(model) == expected + 3 * 66_048 + count(model.backbones)


# Attention.


@pytest.mark.parametrize("attention", ["softmax_inv", "precision"])
def test_before_any_variance_is_learned_attention_is_exactly_equal(attention: str) -> None:
    output = small_aum(attention=attention)(BATCH, KEYS)
    exact = BATCH.present / BATCH.present.sum(1, keepdim=True)
    assert torch.equal(output.reliability, exact)
    assert torch.equal(output.uncertainty["variance"], BATCH.present.float())
    assert torch.equal(output.signals["attention_entropy"], torch.ones(8))
    assert not output.signals["log_variance"].any()
    assert not output.signals["log_variance_spread"].any()


def test_a_high_temperature_makes_attention_equal_and_a_low_one_follows_the_smallest_variance() -> None:
    whole = replace(BATCH, present=torch.ones(8, 3, dtype=torch.bool))
    flat, usual, sharp = (moved(small_aum(theta=theta))(whole, KEYS[:1]) for theta in (1e9, 1.0, 1e-4))
    torch.testing.assert_close(flat.reliability, torch.full((8, 3), 1 / 3), rtol=0, atol=1e-6)
    assert (usual.reliability - 1 / 3).abs().max() > 0.01
    assert torch.equal(sharp.reliability.argmax(1), sharp.uncertainty["variance"].argmin(1))
    assert (flat.signals["attention_entropy"] > 0.9999).all()
    assert (sharp.signals["attention_entropy"] < 1e-3).all()
    # A saturated weight is still the weight of something present.
    assert (sharp.reliability > 0).all()


def test_the_model_weighs_as_its_equation_says() -> None:
    for attention in ("softmax_inv", "precision"):
        model = moved(small_aum(attention=attention, theta=0.5))
        output = model(BATCH, KEYS[:1])
        u = output.uncertainty["variance"]
        raw = ((1 / (u + 1e-3)) / 0.5).exp() if attention == "softmax_inv" else 1 / u.clamp_min(1e-9)
        raw = torch.where(BATCH.present, raw, 0.0)
        torch.testing.assert_close(output.reliability, raw / raw.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)


# What is missing.


def test_what_is_missing_and_has_a_high_variance_takes_part_all_the_same() -> None:
    """The paper's claim does not hold of the literal attention: with v = 1 where present, exp(7) where absent, e^(1/1.001) : 1."""
    present = torch.tensor([[True, True, False]]).expand(8, -1)
    output = small_aum(missing="high_var")(replace(BATCH, present=present), KEYS)
    expected = 1 / (1 + 2 * torch.tensor(1 / 1.001 - 1 / (torch.e**7 + 1e-3)).exp())
    torch.testing.assert_close(output.signals["absent_attention"], expected.expand(8), rtol=1e-5, atol=0)
    assert expected > 0.15
    assert torch.equal(output.reliability, present / 2)
    precise = small_aum(missing="high_var", attention="precision")(replace(BATCH, present=present), KEYS)
    assert (precise.signals["absent_attention"] < 1e-3).all()
    assert not small_aum()(replace(BATCH, present=present), KEYS).signals["absent_attention"].any()


# The shares of variance.


@pytest.mark.parametrize("var_rule", ["independent", "mixture"])
def test_the_shares_of_the_modalities_add_up_to_the_variance_that_arrives(var_rule: str) -> None:
    model = moved(small_aum(var_rule=var_rule, num_layers=1))
    output = model(BATCH, KEYS[:1])
    shares = output.uncertainty[var_rule].sum(1)
    torch.testing.assert_close(shares, output.signals[var_rule])
    # Back from the node: (W * W) [arrived | 0] + floor, summed over outputs, is linear in what arrived.
    mean, log_variance = model.gaussians(model.backbones(BATCH, KEYS[:1]))
    edges = model.edges(Gaussian(mean, log_variance.exp()), BATCH.present, BATCH.weight)
    patients = model.graph(edges, KEYS[:1])
    half = model.graph.update[0].weight.square()[:, :WIDTH]
    arrived = torch.linalg.solve(half.double(), (patients.node.variance[0].double() - 1e-4).T).T
    torch.testing.assert_close(shares.double(), arrived.mean(1), rtol=1e-3, atol=1e-5)


def test_contradiction_shows_in_the_mixture_alone() -> None:
    """Two modalities that agree, and two that do not, with the same variances."""
    agree = Gaussian(torch.zeros(1, 1, 2, WIDTH), torch.ones(1, 1, 2, WIDTH))
    contradict = Gaussian(torch.tensor([0.0, 10.0]).view(1, 1, 2, 1).expand(1, 1, 2, WIDTH), agree.variance)
    a, both = torch.full((1, 1, 2), 0.5), torch.ones(1, 2, dtype=torch.bool)
    found = [readings(value.variance, a, value, both) for value in (agree, contradict)]
    assert found[0]["independent"].sum() == found[1]["independent"].sum() == 0.5
    assert (found[0]["mixture"].sum(), found[1]["mixture"].sum()) == (1.0, 26.0)


# Patients and batches.


@pytest.mark.parametrize("sizes", [(8,), (1, 7), (3, 0, 5), (2, 2, 2, 2)])
def test_any_split_of_a_batch_gives_the_same_logits(sizes: tuple[int, ...]) -> None:
    model = moved(small_aum(num_layers=3)).train()
    whole = model(BATCH, KEYS).logits
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    parts = [model(BATCH.rows(a, a + n), KEYS[:, a : a + n]).logits for a, n in zip(starts, sizes, strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)


# The draw of z.


def test_z_is_drawn_in_training_once_a_pass_and_study_and_is_the_mean_in_evaluation() -> None:
    model = moved(small_aum())
    node = Gaussian(torch.zeros(4, 8, 1000), torch.full((4, 8, 1000), 4.0))
    assert torch.equal(model.drawn(node, KEYS), node.mean)
    drawn = model.train().drawn(node, KEYS)
    assert drawn.mean().abs() < 0.05
    assert drawn.std() == pytest.approx(2, rel=0.02)
    assert torch.equal(model.drawn(node, KEYS), drawn)
    assert len({float(z[0]) for z in drawn.flatten(0, 1)}) == 32
    # The same study draws the same in another batch.
    assert torch.equal(model.drawn(Gaussian(node.mean[:, 3:5], node.variance[:, 3:5]), KEYS[:, 3:5]), drawn[:, 3:5])


def test_nothing_but_z_depends_on_the_mode() -> None:
    """What the loop computes of embeddings without a gradient, in evaluation mode, is what it computes again in training."""
    model = moved(small_aum())
    evaluated, trained = model(BATCH, KEYS), model.train()(BATCH, KEYS)
    assert not torch.equal(evaluated.logits, trained.logits)
    for name in ("kl", "first", "second"):
        assert torch.equal(evaluated.parts[name], trained.parts[name])
    assert torch.equal(evaluated.reliability, trained.reliability)


# Stage 1.


def trained_on(model: Aum, batch: Batch, steps: int, *, weight_decay: float = 0.0) -> torch.optim.AdamW:
    objective = AumObjectiveConfig(beta=0.1).build(SCHEMA)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        terms = objective(model, batch, pass_keys(batch, 2))
        sum(term.scale * term.numerator / term.weight for term in terms.values()).backward()
        optimizer.step()
    return optimizer


def test_in_stage_one_every_parameter_has_a_gradient_and_that_of_variances_is_zero() -> None:
    model = moved(small_aum(warm_epochs=20))
    for epoch, learns in ((0, False), (19, False), (20, True)):
        model.zero_grad()
        trained_on(model, replace(BATCH, epoch=torch.full((8,), epoch)), 1)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        variance = [gradient for name, gradient in gradients.items() if "log_variance" in name]
        assert len(variance) == 4
        assert all(bool(gradient.any()) is learns for gradient in variance if gradient is not None)


def test_in_stage_one_variances_stay_exactly_one_and_adam_keeps_moments_of_zero() -> None:
    model = small_aum(warm_epochs=20)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = trained_on(model, BATCH, 5, weight_decay=0.1)
    changed = dict(model.named_parameters())
    for name, parameter in changed.items():
        if "log_variance" in name:
            assert not optimizer.state[parameter]["exp_avg"].any()
            assert not optimizer.state[parameter]["exp_avg_sq"].any()
            torch.testing.assert_close(parameter.detach(), start[name] * (1 - 1e-2 * 0.1) ** 5)
        else:
            assert not torch.equal(parameter, start[name]), name
    output = model.eval()(BATCH, KEYS)
    assert torch.equal(output.uncertainty["variance"], BATCH.present.float())
    assert torch.equal(output.reliability, BATCH.present / BATCH.present.sum(1, keepdim=True))


def test_stages_are_of_rows_and_change_no_output() -> None:
    """A mixture of sources draws rows of different epochs into one batch."""
    model = moved(small_aum(warm_epochs=3))
    mixed = replace(BATCH, epoch=torch.tensor([2, 3] * 4))
    variance = torch.rand(1, 8, 3, WIDTH, requires_grad=True)
    staged = model.stage(variance, mixed.epoch)
    assert torch.equal(staged, variance)
    (gradient,) = torch.autograd.grad(staged.sum(), variance)
    assert gradient.flatten(2).any(2)[0].tolist() == [False, True] * 4
    assert torch.equal(model(mixed, KEYS).logits, model(replace(mixed, epoch=torch.zeros(8, dtype=torch.int64)), KEYS).logits)


def test_after_the_switch_adam_makes_longer_steps_than_a_fresh_one() -> None:
    """The price of having no state, as the docstring states it: for a constant gradient."""
    waiting, fresh = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    late, new = (torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0) for parameter in (waiting, fresh))
    waiting.grad = torch.zeros_like(waiting)
    late.step()
    assert waiting.item() == 0
    late.state[waiting]["step"].fill_(20_000)
    ratio = []
    for _ in range(300):
        before = waiting.item(), fresh.item()
        for parameter, optimizer in ((waiting, late), (fresh, new)):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        ratio.append((waiting.item() - before[0]) / (fresh.item() - before[1]))
    assert ratio[0] == pytest.approx(3.16, abs=0.01)
    assert max(ratio) == pytest.approx(6.57, abs=0.02)
    assert ratio.index(max(ratio)) + 1 == 12
    assert sum(value > 2 for value in ratio) == 287


# Dropped edges.


def test_edges_are_dropped_as_muse_drops_them() -> None:
    present = torch.tensor([[True, True, True, False], [True, False, False, False]]).repeat(4000, 1)
    keys = noise.sample_keys(0, "mc", None, torch.arange(8000), 1)[0]
    kept = dropped(present, keys)
    assert not (kept & ~present).any()
    counts = kept.sum(1)
    assert (counts[1::2] == 1).all()
    shares = [float((counts[::2] == n).float().mean()) for n in (1, 2, 3)]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.03)
    assert kept[::2].float().mean(0)[:3].tolist() == pytest.approx([0.75] * 3, abs=0.03)


def test_which_edges_are_dropped_depends_on_the_study_alone() -> None:
    present = torch.ones(50, 5, dtype=torch.bool)
    keys = noise.sample_keys(0, "mc", torch.zeros(50, dtype=torch.int64), torch.arange(50), 1)[0]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropped(present, keys[order]), dropped(present, keys)[order])
    other = noise.sample_keys(0, "mc", torch.ones(50, dtype=torch.int64), torch.arange(50), 1)[0]
    assert not torch.equal(dropped(present, other), dropped(present, keys))
