"""Gated additive evidence: the sum by hand, what absence means, what can be read off it, and gates that close on noise."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from planted_tables import SCHEMA as PLANTED
from planted_tables import TABLES, accuracy, corrupt, planted_batch, train

from draf_dist.models.build import build_model
from draf_dist.models.fusion.gated_evidence import GatedEvidence, GatedEvidenceConfig, normalised_gates
from draf_dist.schema.batch import Batch

SCHEMA = small_schema(num_classes=3)
BATCH = small_batch(SCHEMA)
KEYS = pass_keys(BATCH)


def gated(schema: Any = SCHEMA, **options: Any) -> GatedEvidence:
    model = build_model(GatedEvidenceConfig(**({"width": 8, "encoders": SMALL_ENCODERS} | options)), schema, seed=0)
    assert isinstance(model, GatedEvidence)
    with torch.no_grad():
        model.prior.copy_(torch.linspace(-1, 1, schema.num_outputs))
    return model


def test_logits_are_the_prior_and_what_each_present_modality_adds() -> None:
    model = gated()
    features = model.backbones(BATCH, KEYS)
    logits = model(BATCH, KEYS).logits
    for s, b in ((0, 0), (1, 3), (3, 7)):
        expected = model.prior.clone()
        for m in range(3):
            if BATCH.present[b, m]:
                h = features[s, b, m]
                gate = torch.sigmoid(model.gates.weight[m, 0] @ h + model.gates.bias[m, 0])
                expected = expected + gate * (model.evidence.weight[m] @ h + model.evidence.bias[m])
        torch.testing.assert_close(logits[s, b], expected)


def test_what_every_modality_said_adds_up_to_the_logits() -> None:
    model = gated()
    output = model(BATCH, KEYS)
    torch.testing.assert_close(output.logits.mean(0), model.prior + output.parts["evidence"].sum(1))
    assert (output.parts["evidence"][~BATCH.present] == 0).all()
    assert (output.parts["gate"][~BATCH.present] == 0).all()


def test_an_absent_modality_adds_nothing_and_changes_nothing_that_others_say() -> None:
    """Not a mean over the rest: the evidence of the others stays as it was."""
    model = gated()
    everything = replace(BATCH, present=torch.ones(8, 3, dtype=torch.bool))
    without = replace(BATCH, present=torch.tensor([[True, False, True]]).expand(8, 3))
    full, rest = model(everything, KEYS), model(without, KEYS)
    assert torch.equal(full.parts["evidence"][:, [0, 2]], rest.parts["evidence"][:, [0, 2]])
    torch.testing.assert_close(full.logits.mean(0) - full.parts["evidence"][:, 1], rest.logits.mean(0))


def test_without_gates_and_with_evidence_of_zero_only_the_prior_speaks() -> None:
    model = gated()
    with torch.no_grad():
        model.evidence.weight.zero_()
        model.evidence.bias.zero_()
    torch.testing.assert_close(model(BATCH, KEYS).logits, model.prior.expand(4, 8, 3))


def test_reliability_is_each_gate_over_the_sum_of_the_present_ones() -> None:
    gate = torch.tensor([[0.8, 0.2, 0.5], [0.8, 0.0, 0.2], [0.0, 0.3, 0.0]])
    present = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    expected = torch.tensor([[0.8 / 1.5, 0.2 / 1.5, 0.5 / 1.5], [0.8, 0.0, 0.2], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(normalised_gates(gate, present), expected)
    output = gated()(BATCH, KEYS)
    total = output.parts["gate"].sum(1, keepdim=True)
    torch.testing.assert_close(output.reliability, output.parts["gate"] / total)


def test_gates_that_are_shut_to_the_last_bit_share_equally() -> None:
    shut = normalised_gates(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(shut, torch.full((1, 2), 0.5))


def test_gates_start_half_open() -> None:
    output = build_model(GatedEvidenceConfig(), SCHEMA, seed=0)(BATCH, KEYS)
    assert (output.parts["gate"][BATCH.present] - 0.5).abs().mean() < 0.2
    expected = output.parts["gate"].sum(1) / BATCH.present.sum(1)
    torch.testing.assert_close(output.signals["gate_mean"], expected.detach())


def test_the_count_is_that_of_heads_gates_and_prior() -> None:
    with torch.device("meta"):
        model = GatedEvidence(GatedEvidenceConfig(width=64), SCHEMA)
    beside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbones."))
    assert beside == 3 * (64 * 3 + 3) + 3 * (64 + 1) + 3


def mean_part(model: GatedEvidence, name: str, batch: Batch) -> list[float]:
    with torch.no_grad():
        found: list[float] = model(batch, pass_keys(batch)).parts[name].mean(0).flatten().tolist()
    return found


@pytest.mark.parametrize(("lambda_uni", "open_gates"), [(0.0, 0.4), (0.3, 0.6)])
def test_the_gate_of_a_modality_that_is_noise_closes(lambda_uni: float, open_gates: float) -> None:
    """How far the others open is fixed by the unimodal loss alone: without it a gate may halve what its evidence doubles."""
    model = gated(PLANTED, width=16, encoders=TABLES)
    train(model, (0.5, 0.5, 0.0), steps=120, rate=1e-2, lambda_uni=lambda_uni)
    batch = planted_batch((0.5, 0.5, 0.0), rows=500, seed=10_000)
    first, second, noise = mean_part(model, "gate", batch)
    assert noise < 0.4
    assert min(first, second) > open_gates
    assert accuracy(model, batch) > 0.9


def test_the_gate_closes_in_the_rows_where_a_modality_is_corrupted() -> None:
    model = gated(PLANTED, width=16, encoders=TABLES)
    train(model, (0.5, 0.5, 0.5), steps=120, corruption=0.3, rate=1e-2)
    clean = planted_batch((0.5, 0.5, 0.5), rows=500, seed=10_000)
    before, after = mean_part(model, "gate", clean), mean_part(model, "gate", corrupt(clean, "first"))
    assert after[0] < before[0] - 0.05
    assert after[1:] == before[1:]
