"""The fusion models that a reliability of ours can be put around: one line a model, as in the union of all."""

from typing import Annotated, Protocol, cast

from pydantic import Field
from torch import nn

from draf_dist.models.encoders import EncoderChoice
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
from draf_dist.schema.modality import DataSchema

# Those whose fused loss trains the features of encoders (`Backbones`). Late fusion's trains none; the rest read raw inputs.
_OnFeatures = AumConfig | ConcatConfig | DrafConfig | DrfuseConfig | GatedEvidenceConfig | MdaConfig | MeanConfig
FusionOnFeatures = Annotated[_OnFeatures, Field(discriminator="kind")]
# Every fusion model takes a modality for missing if told so.
PlainFusion = Annotated[
    _OnFeatures | DrifaConfig | EarlyConfig | HealnetConfig | LateMeanConfig,
    Field(discriminator="kind"),
]


class _Backed(Protocol):
    encoders: EncoderChoice
    width: int


def encoders_of(config: PlainFusion) -> EncoderChoice:
    """Of the backbones of the model within. Raises AttributeError, as its own config does, where it has none."""
    return cast("_Backed", config).encoders


def width_of(config: PlainFusion) -> int:
    """Z of the features of the model within."""
    return cast("_Backed", config).width


def build_inner(config: PlainFusion, schema: DataSchema, *, presence_bits: bool) -> nn.Module:
    """The model within, with presence bits if it or what is around it asks for them.

    Its dropout keeps the streams that it has by itself, so that the two meet the same masks.
    """
    return config.model_copy(update={"presence_bits": config.presence_bits or presence_bits}).build(schema)
