"""Plain mean of the modalities' features: fusion without reliability, the comparison that DRAF has to win (findings)."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from draf_dist.config.spec import Spec
from draf_dist.models.backbones import Backbones
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.fusion.logits import Prediction, fused_logits
from draf_dist.models.layers import FusionHead
from draf_dist.models.mc import name_streams
from draf_dist.models.reliability import equal_weights
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.modality import DataSchema


class MeanConfig(Spec):
    """The same backbones and head as DRAF, by the same names: with equal parameters it is DRAF at alpha = 0, bit for bit."""

    kind: Literal["mean"] = "mean"
    width: int = Field(64, ge=1)
    encoders: EncoderChoice = EncoderChoice()
    predict: Prediction = "mc"
    presence_bits: bool = False

    def build(self, schema: DataSchema) -> "MeanFusion":
        """The model for one data schema.

        Raises:
            SpecError: an encoder does not fit its modality.
        """
        model = MeanFusion(self, schema)
        name_streams(model)
        return model


class MeanFusion(nn.Module):
    """g of the mean over present modalities."""

    def __init__(self, config: MeanConfig, schema: DataSchema) -> None:
        super().__init__()
        self.config = config
        self.backbones = Backbones(config.encoders, schema, config.width)
        bits = len(schema.modalities) if config.presence_bits else 0
        self.head = FusionHead(config.width, config.width, schema.num_outputs, presence_bits=bits)

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """Logits of S passes of a normalised batch; keys int64 (S, B). No uncertainties: no modality predicts alone."""
        features = self.backbones(batch, keys)
        weights = equal_weights(batch.present)
        return FusionOutput(
            logits=fused_logits(features, weights, batch.present, self.head, self.config.predict),
            reliability=weights,
            uncertainty={},
            features=features.mean(0),
        )
