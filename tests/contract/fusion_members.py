"""Small configurations of every fusion model, and what the contract may expect of it. A new model adds its entry here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from model_inputs import SMALL_ENCODERS, small_schema
from torch import nn

from draf_dist.models.fusion import FusionConfig
from draf_dist.models.fusion.aum import AumConfig
from draf_dist.models.fusion.concat import ConcatConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.drfuse import DrfuseConfig
from draf_dist.models.fusion.drifa import DrifaConfig
from draf_dist.models.fusion.early import EarlyConfig
from draf_dist.models.fusion.gated_evidence import GatedEvidenceConfig
from draf_dist.models.fusion.healnet import HealnetConfig
from draf_dist.models.fusion.late_mean import LateMeanConfig
from draf_dist.models.fusion.mda import MdaConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.models.fusion.severity_gate import SeverityGateConfig
from draf_dist.models.fusion.severity_rejection import SeverityRejectionConfig
from draf_dist.objectives.aum import AumObjectiveConfig
from draf_dist.objectives.drfuse import DrfuseObjectiveConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.batch import Term

MEMBERS = get_args(get_args(FusionConfig)[0])


@dataclass(frozen=True)
class Member:
    """A model in its small form. readings: other options that the whole contract is asked of too.

    objective: what trains it. samples: passes differ, in evaluation too.
    same_in_training: a pass gives the same logits in training. width: Z of `features`; 0 for a model that
    has none of one modality alone.
    """

    config: Any
    readings: tuple[dict[str, Any], ...] = ()
    objective: Callable[..., dict[str, Term]] = FusionObjectiveConfig(lambda_acd=0.5).build()
    samples: bool = True
    same_in_training: bool = True
    width: int = 8

    @property
    def configs(self) -> tuple[Any, ...]:
        """All of them, presence bits among them."""
        readings = ({}, {"presence_bits": True}, *self.readings)
        return tuple(type(self.config).model_validate(self.config.model_dump() | reading) for reading in readings)


def name_of(value: Any) -> str:
    """Of a member, or of one of its configurations, for the name of a test."""
    if isinstance(value, Member):
        return str(value.config.kind)
    return str(value.kind) + str(value.model_dump(exclude_defaults=True, exclude={"encoders", "width"}))


def moved(model: nn.Module) -> nn.Module:
    """The model with its parameters away from their start: of those that are 0 there, every path carries weight then."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def encoded(config: type[Any]) -> Any:
    """A model on encoders."""
    return config(width=8, encoders=SMALL_ENCODERS)


DRAF_READINGS: tuple[dict[str, Any], ...] = (
    {"uni_head": "shared", "predict": "mean_feature"},
    {"uncertainty": "mi", "presence_bits": True, "acd_gate": 0.5, "modality_prior": True},
    {"uncertainty": "entropy", "u_space": "prior_shifted", "reliability_alpha": 16.0, "detach_r": False},
    {"u_space": "logit", "alpha_mode": "scaled", "kappa": 2.0},
    {"reliability": "inverse", "uncertainty": "total", "detach_r": False},
    {"reliability": "learned", "uncertainty": "aleatoric"},
    {"u_ema": 0.9, "reliability_alpha": 64.0},
)
# Stage 1 gives the variances no gradient, which tests/numerics/test_aum.py asks for, and nodes that others change break the
# independence of rows, which is what tests/parity/test_aum_ranks.py is about.
AUM = AumConfig(width=8, encoders=SMALL_ENCODERS, warm_epochs=0)
AUM_READINGS: tuple[dict[str, Any], ...] = (
    {"attention": "precision", "missing": "high_var", "var_rule": "mixture"},
    {"relu_moments": "exact", "num_layers": 3, "theta": 0.1},
    {"attention": "precision", "relu_moments": "exact", "var_rule": "mixture", "num_layers": 1},
)
# Not yet fitted, both say nothing; test_severity_fusion.py asks the contract of them once they are.
AROUND: tuple[dict[str, Any], ...] = tuple(
    {"fusion": encoded(inner).model_dump()} for inner in (DrafConfig, ConcatConfig, MdaConfig)
)
SMALL = {
    member.config.kind: member
    for member in (
        Member(encoded(DrafConfig), DRAF_READINGS),
        Member(encoded(MeanConfig)),
        Member(AUM, AUM_READINGS, AumObjectiveConfig(beta=0.1).build(small_schema(3)), same_in_training=False),
        Member(encoded(ConcatConfig)),
        Member(encoded(LateMeanConfig), ({"combine": "vote"},)),
        Member(
            HealnetConfig(depth=2, latents=3, width=8, heads=2, head_width=4, max_tokens=40, patch_width=5),
            ({"weight_tie_layers": True, "self_per_cross_attn": 2, "snn": False}, {"self_per_cross_attn": 0, "max_tokens": 144}),
            width=0,
        ),
        Member(
            EarlyConfig(hidden=(16, 8), image_side=6), ({"observed_bits": True},), samples=False, same_in_training=False, width=0
        ),
        Member(encoded(MdaConfig)),
        Member(encoded(GatedEvidenceConfig)),
        Member(SeverityRejectionConfig(fusion=encoded(MeanConfig)), AROUND),
        Member(SeverityGateConfig(fusion=encoded(MeanConfig)), AROUND),
        Member(encoded(DrfuseConfig), objective=DrfuseObjectiveConfig().build()),
        Member(DrifaConfig(widths=(2, 4), norm="group", series=SMALL_ENCODERS.series, table=SMALL_ENCODERS.table), width=4),
    )
}
