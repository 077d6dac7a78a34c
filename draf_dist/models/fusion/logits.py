"""From features and weights to the logits of every pass: the two readings of spec 1.1 row 6."""

from typing import Literal

from torch import Tensor

from draf_dist.models.layers import FusionHead
from draf_dist.models.reliability import fuse

Prediction = Literal["mean_feature", "mc"]


def fused_logits(features: Tensor, reliability: Tensor, present: Tensor, head: FusionHead, predict: Prediction) -> Tensor:
    """Logits (S, B, K) of features (S, B, M, Z) under weights (B, M).

    mc: g(sum_m r_m h_m^t) for every pass t, so that mean_t softmax is a predictive distribution. mean_feature (literal,
    DRAF 3.2.3): g(sum_m r_m mean_t h_m^t), one point prediction, the same in all passes.
    """
    if predict == "mc":
        every: Tensor = head(fuse(features, reliability), present)
        return every
    logits: Tensor = head(fuse(features.mean(0), reliability), present)
    return logits.expand(features.shape[0], -1, -1)
