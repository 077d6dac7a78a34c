"""One fusion model a file. Adding one is one file and one line in the union."""

from typing import Annotated

from pydantic import Field

from draf_dist.models.fusion.concat import ConcatConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.late_mean import LateMeanConfig
from draf_dist.models.fusion.mean import MeanConfig

FusionConfig = Annotated[DrafConfig | MeanConfig | ConcatConfig | LateMeanConfig, Field(discriminator="kind")]
