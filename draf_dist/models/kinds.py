"""Every model that a fine-tuning job can name: the fusion models, and those that read one modality."""

from typing import Annotated

from pydantic import Field

from draf_dist.models.fusion import FusionConfig
from draf_dist.models.segmentation import BayesianUnetConfig

ModelConfig = Annotated[FusionConfig | BayesianUnetConfig, Field(discriminator="kind")]
