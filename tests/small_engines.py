"""The smallest models of every kind of step, with what they minimise: for tests of engines."""

from model_inputs import small_schema
from torch import nn

from draf_dist.losses.gather import AllGather, one_process
from draf_dist.models.build import build_model
from draf_dist.models.encoders import Image2dConfig
from draf_dist.models.fusion import FusionConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.objectives.pretrain import build_network
from draf_dist.objectives.pretrain_simclr import SimclrConfig
from draf_dist.training.loop import CoupledObjective, Objective

SIMCLR = SimclrConfig(modality="cxr")


def new_model(config: FusionConfig | None) -> nn.Module:
    """The same parameters at every call. config: of a fusion model; None is SimCLR's network."""
    if config is None:
        return build_network(SIMCLR, small_schema(), Image2dConfig(widths=(4, 8), groups=2), width=16, seed=3)
    return build_model(config, small_schema(), seed=1)


def objective(config: FusionConfig | None, world: int) -> Objective | CoupledObjective:
    """What a step of it minimises, over so many ranks."""
    if config is None:
        return SIMCLR.build(0, AllGather() if world > 1 else one_process)
    return FusionObjectiveConfig().build()
