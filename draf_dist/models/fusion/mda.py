"""MDA (re-derived): modal-domain attention (arXiv 2406.10569), as far as its abstracts say what it is (spec 4.3).

From the abstracts: attention between modalities that relates them linearly, and weights that fall for weakly correlated, missing
or noisy modalities and are read as contributions. The paper's body could not be read and no code was found, so the equations below
are ours (spec 4.3), there is no reference to compare with, and every table calls it "MDA (re-derived)".
"""

import math
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from draf_dist.config.spec import Spec
from draf_dist.models.backbones import Backbones
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.layers import FusionHead
from draf_dist.models.mc import name_streams
from draf_dist.models.reliability import masked_softmax, relative_entropy
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.modality import DataSchema


class MdaConfig(Spec):
    """The width of features, queries, keys and values is one and the same."""

    kind: Literal["mda"] = "mda"
    width: int = Field(64, ge=1)
    encoders: EncoderChoice = EncoderChoice()
    presence_bits: bool = False

    def build(self, schema: DataSchema) -> "Mda":
        """The model for one data schema.

        Raises:
            SpecError: an encoder does not fit its modality.
        """
        model = Mda(self, schema)
        name_streams(model)
        return model


class Mda(nn.Module):
    """g of sum_m w_m V z_m, with z_m the features of the encoders, which end in a LayerNorm.

    Parameters beside the backbones: 3 d^2 of queries, keys and values, and g.
    """

    def __init__(self, config: MdaConfig, schema: DataSchema) -> None:
        super().__init__()
        num_modalities = len(schema.modalities)
        self.backbones = Backbones(config.encoders, schema, config.width)
        self.queries, self.keys, self.values = (nn.Linear(config.width, config.width, bias=False) for _ in range(3))
        bits = num_modalities if config.presence_bits else 0
        self.head = FusionHead(config.width, config.width, schema.num_outputs, presence_bits=bits)

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """Logits of S passes of a normalised batch; keys int64 (S, B). No uncertainties: no modality predicts alone.

        reliability: the weights, mean over passes. signals: attention_entropy, that of the weights over its largest value; 1 is
        plain mean fusion, 0 is one modality alone, and 1 where there is but one.
        """
        present = batch.present
        features = self.backbones(batch, keys)
        weights = modal_weights(self.queries(features), self.keys(features), present)
        reliability = weights.mean(0)
        return FusionOutput(
            logits=self.head(self.fused(features, weights), present),
            reliability=reliability,
            uncertainty={},
            features=features.mean(0),
            signals={"attention_entropy": relative_entropy(reliability.detach(), present)},
        )

    def fused(self, features: Tensor, weights: Tensor) -> Tensor:
        """Sum over m of w_m V z_m, from features (S, B, M, Z) and weights (S, B, M) to (S, B, Z)."""
        fused: Tensor = (weights.unsqueeze(-1) * self.values(features)).sum(-2)
        return fused


def modal_weights(queries: Tensor, keys: Tensor, present: Tensor) -> Tensor:
    """Weights (..., B, M) of queries and keys (..., B, M, Z) and present (B, M): they sum to 1 over present and are 0 elsewhere.

    A = softmax over present k of q_m . k_k / sqrt(Z);  w = mean over present m of A_m  (spec 4.3).
    """
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    attention = masked_softmax(scores, present.unsqueeze(-2))
    rows = present.to(attention.dtype).unsqueeze(-1)
    return (attention * rows).sum(-2) / rows.sum(-2).clamp_min(1)
