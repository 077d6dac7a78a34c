"""Severity x cross-modal gate: a modality counts less where its input is corrupted or does not go with the others (findings, 2).

g_m = P_m sigmoid(a_m - softplus(b_m) s_m) exp(-softplus(c_m) min(relu(z_m - .6), 3)) and
H = sum_m g_m h_m / sum_m g_m + B0 P + B1 (P (1 - g)), with s the severity, z the cross-modal score, B zero-initialised.

From the findings: both equations, the starting values, a learning rate of 1e-2 without weight decay. They are stated for the plain
mean. Ours is how any fusion of encoders' features gets the gate, without a change to it: what a modality has lost is filled with
what the others say, before the fusion sees it,

h'_m = g_m h_m + (1 - g_m) hbar + B1 (P (1 - g)),  hbar = sum_k g_k h_k / sum_k g_k,

whose plain mean over present m is the equation above exactly. With the weights r_m of a fusion it is sum_k w_k h_k +
B1 (P (1 - g)) with w_k = r_k g_k + (1 - sum_m r_m g_m) g_k / sum_m g_m, which sum to 1: those are reported as reliability. B0 P are
the presence bits of the fusion itself. A modality whose gate is shut has no influence left, in any of them.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.models.absent import mask_absent
from draf_dist.models.backbones import Backbones
from draf_dist.models.cross_modal import CrossModalScore
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.models.fusion.wrapped import FusionOnFeatures, build_inner, encoders_of, width_of
from draf_dist.models.layers import PresenceBits
from draf_dist.models.severity import Severity
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.modality import DataSchema

# a, b, c at the start.
INITIAL = (8.0, 4.0, 0.5)
# z up to which a modality is taken to go with the others, and how far beyond it still counts.
AGREEING, MOST_STRANGE = 0.6, 3.0
# How much faster than the rest of the model the gate learns: at the usual 1e-3 that is 1e-2.
RATE = 10.0


class SeverityGateConfig(Spec):
    """fusion: the model that it is put around; presence_bits: B0 P, of the model within."""

    kind: Literal["severity_cross_modal_gate"] = "severity_cross_modal_gate"
    fusion: FusionOnFeatures = MeanConfig()
    presence_bits: bool = False

    @property
    def encoders(self) -> EncoderChoice:
        """Of the model within."""
        return encoders_of(self.fusion)

    @property
    def width(self) -> int:
        """Of the model within."""
        return width_of(self.fusion)

    def build(self, schema: DataSchema) -> "SeverityGate":
        """The model for one data schema.

        Raises:
            SpecError: an encoder does not fit its modality, or the model within has encoders of its own kind.
        """
        return SeverityGate(self, schema)


@dataclass(frozen=True)
class GatedBatch(Batch):
    """A batch on its way through backbones: gate f32 (B, M) in [0, 1], 0 where absent; shift f32 (B, Z), added to all features."""

    gate: Tensor
    shift: Tensor


class Gate(nn.Module):
    """From severity and strangeness to g. Parameters: offsets (3, M), by how much a, b, c differ from their start, a tenth of it.

    So one learning rate for the whole model is ten times as large for a, b and c, and its weight decay draws them to where they
    began instead of to 0: no optimizer needs a group of parameters for them.
    """

    def __init__(self, num_modalities: int) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(3, num_modalities))

    def coefficients(self) -> Tensor:
        """a, b, c of every modality, (3, M)."""
        start = torch.tensor(INITIAL, device=self.offsets.device).unsqueeze(1)
        return start + RATE * self.offsets

    def forward(self, severity: Tensor, strangeness: Tensor, present: Tensor) -> Tensor:
        """The g (B, M) of s and z (B, M): 0 where absent, and nowhere above 1."""
        a, b, c = self.coefficients()
        strange = (strangeness - AGREEING).clamp(0.0, MOST_STRANGE)
        gate = torch.sigmoid(a - functional.softplus(b) * severity) * torch.exp(-functional.softplus(c) * strange)
        return torch.where(present, gate, 0.0)


class SeverityGate(nn.Module):
    """The model within, on features that the gate has passed. Parameters beside it: 3 M of the gate and M Z of B1.

    Buffers: those of severity and cross-modal score. Until they are fitted every g is sigmoid(8).
    """

    def __init__(self, config: SeverityGateConfig, schema: DataSchema) -> None:
        super().__init__()
        num_modalities = len(schema.modalities)
        self.fusion = build_inner(config.fusion, schema, presence_bits=config.presence_bits)
        self.severity = Severity(schema)
        self.cross_modal = CrossModalScore(schema)
        self.gate = Gate(num_modalities)
        self.rejected = PresenceBits(num_modalities, config.width)
        backbones = [part for part in self.fusion.modules() if isinstance(part, Backbones)]
        if not backbones:
            remedy = "Leave the model's own encoders out (drfuse: trunks)."
            raise SpecError(explain(f"model {config.kind}", expected="a fusion of `encoders`", found="none of them", remedy=remedy))
        for part in backbones:
            part.register_forward_hook(pass_gate)

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """What the model within says of a normalised batch; keys int64 (S, B).

        reliability: w of the module's docstring. uncertainty: besides that of the model within, severity s and cross_modal, z as
        far as it is above 0. signals: gate, the mean of g over present modalities, and gate_least, the smallest.
        """
        present = batch.present
        severity, strangeness = self.severity(batch), self.cross_modal(batch)
        gate = self.gate(severity, strangeness, present)
        shift = self.rejected(torch.where(present, 1 - gate, 0.0))
        output: FusionOutput = self.fusion(GatedBatch(**vars(batch), gate=gate, shift=shift), keys)
        return replace(
            output,
            reliability=shares(output.reliability, gate, present),
            uncertainty=output.uncertainty | {"severity": severity, "cross_modal": strangeness.clamp_min(0.0)},
            signals=output.signals | gate_signals(gate.detach(), present),
        )


def pass_gate(_: nn.Module, inputs: tuple[Any, ...], features: Tensor) -> Tensor:
    """A forward hook of backbones: features (S, B, M, Z) of a GatedBatch after the gate, of any other batch as they are."""
    batch = inputs[0]
    return gated(features, batch.gate, batch.present, batch.shift) if isinstance(batch, GatedBatch) else features


def gated(features: Tensor, gate: Tensor, present: Tensor, shift: Tensor) -> Tensor:
    """The h' (..., B, M, Z) of features, gate and present (B, M), and shift (B, Z); exactly 0 where absent."""
    share = gate.unsqueeze(-1)
    together = (share * features).sum(-2, keepdim=True) / share.sum(-2, keepdim=True).clamp_min(torch.finfo(gate.dtype).tiny)
    return mask_absent(share * features + (1 - share) * together + shift.unsqueeze(-2), present)


def shares(weights: Tensor, gate: Tensor, present: Tensor) -> Tensor:
    """The w (B, M): the share of every modality's own features, where a fusion weighs h' by weights r (B, M)."""
    own = weights * gate
    spread = gate / gate.sum(1, keepdim=True).clamp_min(torch.finfo(gate.dtype).tiny)
    return torch.where(present, own + (1 - own.sum(1, keepdim=True)).clamp_min(0.0) * spread, 0.0)


def gate_signals(gate: Tensor, present: Tensor) -> dict[str, Tensor]:
    """Mean and smallest gate of what is present, (B,)."""
    mean = gate.sum(1) / present.sum(1).clamp_min(1)
    return {"gate": mean, "gate_least": torch.where(present, gate, math.inf).amin(1).clamp_max(1.0)}
