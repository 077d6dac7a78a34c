"""Small configurations of every fusion model, and what the contract may expect of it. A new model adds its entry here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from model_inputs import SMALL_ENCODERS

from draf_dist.models.fusion import FusionConfig
from draf_dist.models.fusion.concat import ConcatConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.late_mean import LateMeanConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.batch import Term

MEMBERS = get_args(get_args(FusionConfig)[0])


@dataclass(frozen=True)
class Member:
    """A model in its small form. readings: other options that the whole contract is asked of too.

    objective: what trains it. samples: passes differ, in evaluation too. width: Z of `features`; 0 for a model that
    has none of one modality alone.
    """

    config: Any
    readings: tuple[dict[str, Any], ...] = ()
    objective: Callable[..., dict[str, Term]] = FusionObjectiveConfig(lambda_acd=0.5).build()
    samples: bool = True
    width: int = 8

    @property
    def configs(self) -> tuple[Any, ...]:
        """All of them, presence bits among them."""
        readings = ({}, {"presence_bits": True}, *self.readings)
        return tuple(type(self.config).model_validate(self.config.model_dump() | reading) for reading in readings)


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
SMALL = {
    member.config.kind: member
    for member in (
        Member(encoded(DrafConfig), DRAF_READINGS),
        Member(encoded(MeanConfig)),
        Member(encoded(ConcatConfig)),
        Member(encoded(LateMeanConfig), ({"combine": "vote"},)),
    )
}
