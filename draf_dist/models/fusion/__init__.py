"""One fusion model a file. Adding one is one file and one line in the union."""

from typing import Annotated

from pydantic import Field

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

FusionConfig = Annotated[
    DrafConfig
    | MeanConfig
    | ConcatConfig
    | LateMeanConfig
    | HealnetConfig
    | AumConfig
    | EarlyConfig
    | MdaConfig
    | GatedEvidenceConfig
    | SeverityRejectionConfig
    | SeverityGateConfig
    | DrfuseConfig
    | DrifaConfig,
    Field(discriminator="kind"),
]
