"""The spec of a pre-training job: an encoder of one modality, without labels."""

from typing import Literal

from pydantic import Field

from draf_dist.models.encoders import EncoderConfig
from draf_dist.objectives.pretrain import PretrainObjectiveConfig
from draf_dist.training.job import TrainJob


class PretrainJob(TrainJob):
    """What `encoder` learns by `objective`, whose `modality` it reads; see docs/pretraining.md.

    encoder, width: as fine-tuning will have them; encoder None is the default of the modality's kind. With `simclr` a batch is
    also what a view is told from: batch_size is a matter of the method there, not of memory (that is the profile's accumulation).
    """

    kind: Literal["pretrain"] = "pretrain"
    objective: PretrainObjectiveConfig
    encoder: EncoderConfig | None = None
    width: int = Field(64, ge=1)
