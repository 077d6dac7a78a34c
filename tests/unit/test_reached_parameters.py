"""Rule D2: a loss reaches every parameter, whatever is missing: ZeRO lets one without a gradient decay, plain torch does not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from pydantic import TypeAdapter

from draf_dist.models.build import build_model
from draf_dist.models.fusion import FusionConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.batch import Batch

SCHEMA = small_schema()
# Every part that has parameters of its own, with and without a gradient through the weights.
MODELS: list[dict[str, Any]] = [
    {"kind": "draf"},
    {"kind": "draf", "uni_head": "shared"},
    {"kind": "draf", "detach_r": False, "acd_gate": 1.0},
    {"kind": "draf", "modality_prior": True},
    {"kind": "draf", "reliability": "inverse", "u_ema": 0.9},
    {"kind": "draf", "reliability": "learned"},
    {"kind": "draf", "reliability": "learned", "modality_prior": True, "detach_r": False},
    {"kind": "draf", "presence_bits": True, "predict": "mean_feature"},
    {"kind": "mean"},
    {"kind": "mean", "presence_bits": True},
    {"kind": "concat"},
    {"kind": "concat", "presence_bits": True},
    {"kind": "late_mean"},
    {"kind": "late_mean", "presence_bits": True},
]


def batch_with(kind: str) -> Batch:
    batch = small_batch(SCHEMA)
    if kind == "no image":
        return replace(batch, present=batch.present & torch.tensor([False, True, True]))
    if kind == "nothing present, no label":
        target = replace(batch.target, observed=torch.zeros_like(batch.target.observed))
        return replace(batch, present=torch.zeros_like(batch.present), target=target)
    if kind == "padding alone":
        return replace(batch, weight=torch.zeros_like(batch.weight), present=torch.zeros_like(batch.present))
    return batch


@pytest.mark.parametrize("kind", ["ordinary", "no image", "nothing present, no label", "padding alone"])
@pytest.mark.parametrize("tree", MODELS, ids=lambda tree: "-".join(str(value) for value in tree.values()))
def test_a_gradient_reaches_every_parameter_whatever_is_missing(tree: dict[str, Any], kind: str) -> None:
    config = TypeAdapter(FusionConfig).validate_python({**tree, "width": 8, "encoders": SMALL_ENCODERS.model_dump()})
    model = build_model(config, SCHEMA, seed=1)
    batch = batch_with(kind)
    terms = FusionObjectiveConfig().build()(model, batch, pass_keys(batch, 2))
    torch.stack([term.numerator for term in terms.values()]).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    assert gradients.isfinite().all()


def test_a_term_of_no_weight_still_reaches_its_parameters() -> None:
    model = build_model(TypeAdapter(FusionConfig).validate_python({"kind": "draf", "width": 8}), SCHEMA, seed=1)
    batch = small_batch(SCHEMA)
    terms = FusionObjectiveConfig(lambda_acd=0, lambda_uni=0).build()(model, batch, pass_keys(batch, 2))
    torch.stack([term.numerator * term.scale for term in terms.values()]).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
