"""Severity rejection and the severity x cross-modal gate: equations by hand, and what they do on planted truth."""

import math

import pytest
import torch
from model_inputs import pass_keys
from planted_views import NAMES, VIEWS, noisy, planted, swapped
from torch import Tensor

from draf_dist.losses.task import task_loss
from draf_dist.metrics.classification import auroc
from draf_dist.models.build import build_model
from draf_dist.models.calibration import fit_on_clean
from draf_dist.models.encoders import EncoderChoice, TabularConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.models.fusion.severity_gate import INITIAL, Gate, SeverityGate, SeverityGateConfig, gated, shares
from draf_dist.models.fusion.severity_rejection import keep
from draf_dist.schema.batch import Batch, FusionOutput

LARGEST = math.log(7)


def test_rejection_by_hand() -> None:
    present = torch.tensor([[True, True, True], [True, True, False], [True, True, True], [False, True, False]])
    severity = torch.tensor([[0.0, 1.94, 1.95], [2.3, 2.1, 0.0], [2.2, 2.0, 2.0], [0.0, 2.3, 0.0]])
    kept = keep(present, severity, LARGEST)
    assert kept.tolist() == [[True, True, False], [False, True, False], [False, True, False], [False, True, False]]
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert not keep(nothing, torch.zeros(1, 3), LARGEST).any()


def test_gate_starts_at_its_documented_values() -> None:
    gate = Gate(4)
    torch.testing.assert_close(gate.coefficients(), torch.tensor([8.0, 4.0, 0.5]).unsqueeze(1).expand(3, 4))
    assert INITIAL == (8.0, 4.0, 0.5)
    assert sum(parameter.numel() for parameter in gate.parameters()) == 12


def test_a_step_of_adam_moves_the_gate_ten_times_as_far_as_the_rest_and_decay_draws_it_to_its_start() -> None:
    gate = Gate(2)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-3, weight_decay=0.0)
    gate.coefficients().sum().backward()
    optimizer.step()
    torch.testing.assert_close(gate.coefficients()[:, 0], torch.tensor(INITIAL) - 1e-2)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-3, weight_decay=900.0)
    for _ in range(200):
        gate.offsets.grad = torch.zeros_like(gate.offsets)
        optimizer.step()
    torch.testing.assert_close(gate.coefficients()[:, 0], torch.tensor(INITIAL))


def test_gate_is_its_closed_form() -> None:
    gate = Gate(3)
    severity = torch.tensor([[0.0, math.log(7), 0.5]])
    strange = torch.tensor([[0.6, -2.0, 1.6]])
    soft = math.log1p(math.exp(4.0)), math.log1p(math.exp(0.5))
    expected = [sigmoid(8.0), sigmoid(8 - soft[0] * math.log(7)), sigmoid(8 - soft[0] * 0.5) * math.exp(-soft[1])]
    found = gate(severity, strange, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(found, torch.tensor([expected]))
    # More than 3 beyond .6 is no stranger, and what is absent has none.
    far = gate(severity, torch.tensor([[3.6, 99.0, 1.0]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(far[0, 0], torch.tensor(sigmoid(8.0) * math.exp(-3 * soft[1])))
    torch.testing.assert_close(far[0, 1], torch.tensor(expected[1] * math.exp(-3 * soft[1])))
    assert not far[0, 2]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_mean_of_what_passed_the_gate_is_the_equation_of_the_findings() -> None:
    """H = sum g h / sum g + B1 (P (1 - g))."""
    generator = torch.Generator().manual_seed(4)
    features, gate = torch.randn(2, 5, 3, 8, generator=generator), torch.rand(5, 3, generator=generator)
    present = torch.rand(5, 3, generator=generator) < 0.7
    present[:, 0] = True
    features, gate = features * present.unsqueeze(-1), gate * present
    shift = torch.randn(5, 8, generator=generator)
    passed = gated(features, gate, present, shift)
    mean = passed.sum(2) / present.sum(1).view(1, 5, 1)
    expected = (gate.unsqueeze(-1) * features).sum(2) / gate.sum(1).view(1, 5, 1) + shift
    torch.testing.assert_close(mean, expected)
    assert not passed[:, ~present].any()
    # With other weights, the features that were not filled count with the share that is reported.
    weights = torch.rand(5, 3, generator=generator) * present
    weights = weights / weights.sum(1, keepdim=True)
    fused = (weights.unsqueeze(-1) * passed).sum(2)
    torch.testing.assert_close(fused, (shares(weights, gate, present).unsqueeze(-1) * features).sum(2) + shift)
    equal = present / present.sum(1, keepdim=True)
    torch.testing.assert_close(shares(equal, gate, present), gate / gate.sum(1, keepdim=True))


ENCODERS = EncoderChoice(table=TabularConfig(hidden=16))


@pytest.fixture(scope="module")
def trained() -> SeverityGate:
    """A gated mean on three views of one hidden factor; training meets noise of up to 10, and swaps."""
    model = build_model(SeverityGateConfig(fusion=MeanConfig(width=16, encoders=ENCODERS)), VIEWS, seed=0)
    assert isinstance(model, SeverityGate)
    clean = [planted(800, seed=10)], [planted(400, seed=20)]
    fit_on_clean(model, lambda: clean[0], lambda: clean[1], seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(200):
        batch = corrupted(clean[0][0].rows(100 * (step % 8), 100 * (step % 8) + 100), step)
        term = task_loss(model(batch, pass_keys(batch, 1, seed=step)).logits, batch.target, batch.weight)
        optimizer.zero_grad()
        (term.numerator / term.weight).backward()
        optimizer.step()
    return model.eval()


def corrupted(batch: Batch, step: int) -> Batch:
    """One view after another clean, under noise, swapped."""
    name, what = NAMES[step % 3], step // 3 % 4
    return (batch, noisy(batch, name, 3.2), noisy(batch, name, 10.0), swapped(batch, name))[what]


def gate_of(model: SeverityGate, batch: Batch) -> Tensor:
    return model.gate(model.severity(batch), model.cross_modal(batch), batch.present).detach()


def test_the_gate_is_nearly_open_on_clean_data_and_falls_with_noise(trained: SeverityGate) -> None:
    batch = planted(400, seed=30)
    clean = gate_of(trained, batch)
    assert float(clean.mean()) > 0.9
    for column, name in enumerate(NAMES):
        under = [float(gate_of(trained, noisy(batch, name, sigma))[:, column].mean()) for sigma in (0.8, 3.2, 10.0)]
        assert float(clean[:, column].mean()) > under[0] > under[1] > under[2]
        assert under[2] < 0.3
        # The others' stay open.
        rest = [other for other in range(3) if other != column]
        assert float(gate_of(trained, noisy(batch, name, 10.0))[:, rest].mean()) > 0.75


def test_the_gate_falls_where_a_view_is_another_subject_s(trained: SeverityGate) -> None:
    batch = planted(400, seed=30)
    for column, name in enumerate(NAMES):
        strange = gate_of(trained, swapped(batch, name))[:, column]
        assert float(strange.mean()) < float(gate_of(trained, batch)[:, column].mean()) - 0.2


def test_shutting_out_noise_keeps_what_the_other_views_say(trained: SeverityGate) -> None:
    """Of one and the same trained net: with its gate, and with the gate held open."""
    batch = noisy(planted(1000, seed=40), "labs", 10.0)
    keys = pass_keys(batch, 8)
    gated_auroc = auroc_of(trained(batch, keys), batch)
    before = trained.gate.offsets.detach().clone()
    with torch.no_grad():
        trained.gate.offsets[0], trained.gate.offsets[1:] = 10.0, -10.0
    held_open = auroc_of(trained(batch, keys), batch)
    with torch.no_grad():
        trained.gate.offsets.copy_(before)
    assert gated_auroc > held_open


def auroc_of(output: FusionOutput, batch: Batch) -> float:
    return auroc(output.logits.softmax(-1).mean(0).detach().double().numpy(), batch.classes.label.numpy())
