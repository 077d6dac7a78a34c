"""Severity rejection and the severity x cross-modal gate, around every fusion model that they can be put around."""

import math
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import pytest
import torch
from fusion_members import MEMBERS, SMALL, moved
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema, small_stats, with_absent_slots
from torch import Tensor, nn

from draf_dist.errors import SpecError
from draf_dist.models.build import build_model
from draf_dist.models.calibration import calibrate, fit_on_clean, set_prevalence
from draf_dist.models.export import load_model, save_model
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.drfuse import DrfuseConfig
from draf_dist.models.fusion.severity_gate import SeverityGateConfig
from draf_dist.models.fusion.severity_rejection import SeverityRejectionConfig
from draf_dist.models.fusion.wrapped import FusionOnFeatures, PlainFusion
from draf_dist.schema.batch import Batch, FusionOutput, SeriesInput

SCHEMA = small_schema(num_classes=3)
OURS = ("severity_rejection", "severity_cross_modal_gate")
PLAIN = [config for kind, member in SMALL.items() if kind not in OURS for config in member.configs[:2]]
GATEABLE = [config for config in PLAIN if isinstance(config, get_args(get_args(FusionOnFeatures)[0]))]
WRAPPED = [SeverityRejectionConfig(fusion=config) for config in PLAIN] + [SeverityGateConfig(fusion=c) for c in GATEABLE]
LARGEST = math.log(7)


def name_of(config: Any) -> str:
    inner = getattr(config, "fusion", config)
    bits = "+bits" if inner.presence_bits else ""
    return f"{inner.kind}{bits}" if inner is config else f"{config.kind}-{inner.kind}{bits}"


every_plain = pytest.mark.parametrize("inner", PLAIN, ids=name_of)
every_gateable = pytest.mark.parametrize("inner", GATEABLE, ids=name_of)
every_wrapped = pytest.mark.parametrize("config", WRAPPED, ids=name_of)


def scaled(batch: Batch, name: str, factor: float) -> Batch:
    value = batch.inputs[name]
    changed = value * factor if isinstance(value, Tensor) else replace(value, values=value.values * factor)
    return replace(batch, inputs=batch.inputs | {name: changed})


@cache
def evidence() -> dict[str, Tensor]:
    """What severity and cross-modal score are on clean batches, by the name of the buffer; the nets take seconds to train."""
    model = build_model(SMALL["severity_cross_modal_gate"].config, SCHEMA, seed=0)
    train, validation = ([small_batch(SCHEMA, rows=64, seed=seed)] for seed in (1, 2))
    fit_on_clean(model, lambda: train, lambda: validation, seed=0)
    return {name: value for name, value in model.state_dict().items() if name.startswith(("severity.", "cross_modal."))}


def fitted(config: Any) -> nn.Module:
    """Fitted to clean batches; parameters that start at 0 are moved, so that every path carries weight."""
    model = build_model(config, SCHEMA, seed=3)
    buffers = dict(model.named_buffers())
    model.load_state_dict({name: value for name, value in evidence().items() if name in buffers}, strict=False)
    return moved(model).eval()


def tensors_of(output: FusionOutput) -> dict[str, Tensor]:
    """What every model gives, rows first."""
    return {
        "logits": output.logits.transpose(0, 1),
        "reliability": output.reliability,
        "features": output.features,
        **output.uncertainty,
        **output.signals,
    }


def assert_same(left: FusionOutput, right: FusionOutput, tolerance: float = 0.0) -> None:
    found, expected = tensors_of(left), tensors_of(right)
    for name in found.keys() & expected.keys():
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, equal_nan=False)


def test_every_fusion_model_is_one_that_these_go_around_or_one_of_them() -> None:
    kinds = {member.model_fields["kind"].default for member in MEMBERS}
    around = {config.model_fields["kind"].default for config in get_args(get_args(PlainFusion)[0])}
    assert kinds == around | set(OURS)


# Rejection


@every_plain
def test_what_is_rejected_is_missing_to_the_last_bit(inner: Any) -> None:
    model = fitted(SeverityRejectionConfig(fusion=inner))
    batch = scaled(small_batch(SCHEMA), "vitals", 40.0)
    keys = pass_keys(batch)
    output = model(batch, keys)
    kept = output.parts["present"]
    # Of those that have something else, nobody keeps the series; nothing else is lost.
    others = batch.present[:, [0, 2]].any(1)
    assert torch.equal(kept[:, 1], batch.present[:, 1] & ~others)
    assert torch.equal(kept[:, [0, 2]], batch.present[:, [0, 2]])
    assert kept.any(1).all()
    assert_same(output, model.fusion(replace(batch, present=kept), keys))
    assert not output.reliability[batch.present & ~kept].any()
    assert float(output.signals["rejected"].sum()) > 0
    assert float(output.uncertainty["severity"][:, 1].max()) > LARGEST


@every_plain
def test_before_the_fit_rejection_is_the_model_within_with_its_starting_parameters_and_masks(inner: Any) -> None:
    batch = scaled(small_batch(SCHEMA), "vitals", 40.0)
    keys = pass_keys(batch)
    output = build_model(SeverityRejectionConfig(fusion=inner), SCHEMA, seed=3).eval()(batch, keys)
    assert_same(output, build_model(inner, SCHEMA, seed=3).eval()(batch, keys))
    assert torch.equal(output.parts["present"], batch.present)


def test_a_smaller_threshold_rejects_more() -> None:
    batch = scaled(small_batch(SCHEMA, rows=40), "labs", 2.5)
    rejected = []
    for sigma in (9.0, 6.0, 1.0):
        output = fitted(SeverityRejectionConfig(fusion=SMALL["mean"].config, largest_sigma=sigma))(batch, pass_keys(batch))
        rejected.append(float(output.signals["rejected"].sum()))
    assert rejected[0] <= rejected[1] < rejected[2]


# Gate


@every_gateable
def test_an_unfitted_gate_is_all_but_open(inner: Any) -> None:
    batch = small_batch(SCHEMA)
    keys = pass_keys(batch)
    model = build_model(SeverityGateConfig(fusion=inner), SCHEMA, seed=3).eval()
    output = model(batch, keys)
    torch.testing.assert_close(output.signals["gate"], torch.full((8,), 1 / (1 + math.exp(-8))))
    assert_same(output, build_model(inner, SCHEMA, seed=3).eval()(batch, keys), tolerance=2e-3)


def test_gated_mean_predicts_from_that_equation() -> None:
    model = fitted(SeverityGateConfig(fusion=SMALL["mean"].config, presence_bits=True))
    batch = scaled(small_batch(SCHEMA), "labs", 12.0)
    keys = pass_keys(batch)
    output = model(batch, keys)
    gate = model.gate(model.severity(batch), model.cross_modal(batch), batch.present).detach()
    assert float(gate[batch.present].min()) < 0.5
    plain = model.fusion.backbones(batch, keys)
    fused = (gate.unsqueeze(-1) * plain).sum(2) / gate.sum(1).view(1, 8, 1)
    lost = model.rejected(batch.present * (1 - gate))
    torch.testing.assert_close(output.logits, model.fusion.head(fused + lost, batch.present))
    torch.testing.assert_close(output.reliability, gate / gate.sum(1, keepdim=True))


@every_gateable
def test_a_modality_whose_gate_is_shut_has_no_influence(inner: Any) -> None:
    model = build_model(SeverityGateConfig(fusion=inner), SCHEMA, seed=3).eval()
    with torch.no_grad():
        model.gate.offsets[0, 2] = -20.0
    batch = replace(small_batch(SCHEMA), present=torch.ones(8, 3, dtype=torch.bool))
    keys = pass_keys(batch)
    other = scaled(batch, "labs", -5.0)
    torch.testing.assert_close(model(other, keys).logits, model(batch, keys).logits, rtol=1e-5, atol=1e-6)
    assert (model(batch, keys).reliability[:, 2] < 1e-6).all()
    # With the gate open it has.
    with torch.no_grad():
        model.gate.offsets.zero_()
    assert (model(other, keys).logits - model(batch, keys).logits).abs().max() > 1e-4


def test_gate_is_refused_around_encoders_that_it_can_not_reach() -> None:
    schema = SCHEMA.model_copy(update={"modalities": SCHEMA.modalities[:2]})
    inner = DrfuseConfig.model_validate({"width": 8, "trunks": {"heads": 2, "feed_forward": 8, "blocks": (1,), "channels": 4}})
    with pytest.raises(SpecError, match="severity_cross_modal_gate: expected a fusion of `encoders`, found none"):
        SeverityGateConfig(fusion=inner).build(schema)
    with pytest.raises(ValueError, match="late_mean"):
        SeverityGateConfig.model_validate({"fusion": {"kind": "late_mean"}})


# Both, once fitted


@every_wrapped
@pytest.mark.parametrize("filler", [float("nan"), 1e6])
def test_once_fitted_absent_slots_and_other_rows_still_change_nothing(config: Any, filler: float) -> None:
    model = fitted(config)
    batch = scaled(small_batch(SCHEMA), "vitals", 3.0)
    keys = pass_keys(batch)
    whole = model(batch, keys)
    assert_same(model(with_absent_slots(batch, filler), keys), whole)
    for start, stop in ((0, 3), (3, 8)):
        part = tensors_of(model(batch.rows(start, stop), keys[:, start:stop]))
        for name, value in tensors_of(whole).items():
            torch.testing.assert_close(part[name], value[start:stop], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.reliability.sum(1), torch.ones(8))


@pytest.mark.parametrize("kind", OURS)
def test_what_was_fitted_survives_the_export(kind: str, tmp_path: Any) -> None:
    config = SMALL[kind].config
    model = fitted(config)
    batch = scaled(small_batch(SCHEMA), "labs", 4.0)
    keys = pass_keys(batch)
    save_model(tmp_path, model, config, SCHEMA, small_stats())
    loaded = load_model(tmp_path)
    assert loaded.config == config
    assert_same(loaded.model.eval()(batch, keys), model(batch, keys))
    assert model(batch, keys).uncertainty["severity"].any()


@pytest.mark.parametrize("kind", OURS)
def test_presence_bits_are_those_of_the_model_within(kind: str) -> None:
    config = SMALL[kind].config
    outside = build_model(config.model_copy(update={"presence_bits": True}), SCHEMA, seed=3).state_dict()
    inside = config.model_copy(update={"fusion": config.fusion.model_copy(update={"presence_bits": True})})
    assert outside.keys() == build_model(inside, SCHEMA, seed=3).state_dict().keys()


@pytest.mark.parametrize("kind", OURS)
def test_calibration_reaches_the_draf_within(kind: str) -> None:
    inner = DrafConfig(width=8, encoders=SMALL_ENCODERS, alpha_mode="scaled", u_space="prior_shifted", uncertainty="total")
    config = type(SMALL[kind].config)(fusion=inner)
    assert (config.width, config.encoders) == (8, SMALL_ENCODERS)
    model = build_model(config, SCHEMA, seed=3)
    set_prevalence(model, torch.tensor([80, 15, 5]), torch.tensor([100, 100, 100]))
    torch.testing.assert_close(model.fusion.log_prevalence.softmax(0), torch.tensor([0.8, 0.15, 0.05]), rtol=0.05, atol=0.02)
    batch = small_batch(SCHEMA)
    calibrate(model, [(batch, pass_keys(batch))])
    used = model.eval()(batch, pass_keys(batch)).uncertainty["used"]
    torch.testing.assert_close(model.fusion.weights.u_scale, used[batch.present].std(correction=0).detach())


def test_models_that_ask_for_nothing_leave_clean_data_unread() -> None:
    def unread() -> Any:
        raise AssertionError("read")

    fit_on_clean(build_model(SMALL["mean"].config, SCHEMA, seed=0), unread, unread, seed=0)


def test_series_are_not_touched() -> None:
    """The wrappers read inputs and never write them."""
    batch = scaled(small_batch(SCHEMA), "vitals", 40.0)
    before = {name: (value if isinstance(value, Tensor) else value.values).clone() for name, value in batch.inputs.items()}
    for config in (SMALL[kind].config for kind in OURS):
        fitted(config)(batch, pass_keys(batch))
    for name, value in batch.inputs.items():
        assert torch.equal(before[name], value.values if isinstance(value, SeriesInput) else value)
