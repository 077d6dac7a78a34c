"""Feature concatenation: encoders, then one MLP over all their features (spec 4.1, variant `feature`).

Not the early fusion that the DRAF proposal compares with, which concatenates raw inputs: tables call this "feature
concatenation".
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from draf_dist.config.spec import Spec
from draf_dist.models.backbones import Backbones
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.layers import FusionHead
from draf_dist.models.mc import name_streams
from draf_dist.models.reliability import equal_weights
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.modality import DataSchema


class ConcatConfig(Spec):
    """An absent modality's features are zeros, so the head can learn what absence means even without presence bits."""

    kind: Literal["concat"] = "concat"
    width: int = Field(64, ge=1)
    encoders: EncoderChoice = EncoderChoice()
    presence_bits: bool = False

    def build(self, schema: DataSchema) -> "ConcatFusion":
        """The model for one data schema.

        Raises:
            SpecError: an encoder does not fit its modality.
        """
        model = ConcatFusion(self, schema)
        name_streams(model)
        return model


class ConcatFusion(nn.Module):
    """g of [h_1, ..., h_M]. It has no weights of its own; `reliability` says 1 / n over present."""

    def __init__(self, config: ConcatConfig, schema: DataSchema) -> None:
        super().__init__()
        num_modalities = len(schema.modalities)
        self.backbones = Backbones(config.encoders, schema, config.width)
        bits = num_modalities if config.presence_bits else 0
        self.head = FusionHead(num_modalities * config.width, config.width, schema.num_outputs, presence_bits=bits)

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """Logits of S passes of a normalised batch; keys int64 (S, B)."""
        features = self.backbones(batch, keys)
        return FusionOutput(
            logits=self.head(features.flatten(-2), batch.present),
            reliability=equal_weights(batch.present),
            uncertainty={},
            features=features.mean(0),
        )
