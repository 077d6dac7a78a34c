"""Severity rejection: a modality whose input is corrupted beyond use is taken for missing (findings, second part).

P'_m = P_m [s_m <= log(1 + 6)], at least one kept; from there on all is as for missing modalities, in any fusion model. The rule,
its threshold and that it is not to be tuned on a small validation set are the findings'; which one is kept is ours: the least
corrupted.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from draf_dist.config.spec import Spec
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.models.fusion.wrapped import PlainFusion, build_inner, encoders_of, width_of
from draf_dist.models.severity import Severity
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.modality import DataSchema


class SeverityRejectionConfig(Spec):
    """fusion: the model that it is put around. largest_sigma: sigma_hat above it is rejected; the table ends at 10.

    presence_bits: of the model within, which then tell what was rejected as what is missing.
    """

    kind: Literal["severity_rejection"] = "severity_rejection"
    fusion: PlainFusion = MeanConfig()
    largest_sigma: float = Field(6.0, gt=0, lt=10)
    presence_bits: bool = False

    @property
    def encoders(self) -> EncoderChoice:
        """Of the model within."""
        return encoders_of(self.fusion)

    @property
    def width(self) -> int:
        """Of the model within."""
        return width_of(self.fusion)

    def build(self, schema: DataSchema) -> "SeverityRejection":
        """The model for one data schema.

        Raises:
            SpecError: an encoder does not fit its modality; see the model within.
        """
        return SeverityRejection(self, schema)


class SeverityRejection(nn.Module):
    """The model within, given what is not rejected. Parameters: its own alone.

    It rejects in training as in evaluation; the severity is fitted before and frozen. Until it is fitted it rejects nothing.
    """

    def __init__(self, config: SeverityRejectionConfig, schema: DataSchema) -> None:
        super().__init__()
        self.config = config
        self.fusion = build_inner(config.fusion, schema, presence_bits=config.presence_bits)
        self.severity = Severity(schema)

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """What the model within says of a normalised batch; keys int64 (S, B). What is rejected has weight 0.

        uncertainty: severity, s. parts: present, bool (B, M), what was not rejected. signals: rejected, its share of what is there.
        """
        severity = self.severity(batch)
        kept = keep(batch.present, severity, math.log1p(self.config.largest_sigma))
        output: FusionOutput = self.fusion(replace(batch, present=kept), keys)
        rejected = (batch.present & ~kept).sum(1) / batch.present.sum(1).clamp_min(1)
        return replace(
            output,
            uncertainty=output.uncertainty | {"severity": severity},
            parts=output.parts | {"present": kept},
            signals=output.signals | {"rejected": rejected},
        )


def keep(present: Tensor, severity: Tensor, largest: float) -> Tensor:
    """P' bool (B, M): present, with a severity of at most `largest`; where none is, the first of the least severe ones alone."""
    kept = present & (severity <= largest)
    order = torch.where(present, severity, math.inf).argmin(1, keepdim=True)
    least = torch.zeros_like(present).scatter(1, order, value=True) & present
    return torch.where(kept.any(1, keepdim=True), kept, least)
