"""Gated additive evidence: every modality adds its evidence to the logits, as far as its own gate lets it [ours].

If modalities were independent given the class, the log odds of all would be the prior's plus the sum of each one's log-likelihood
ratio. So an absent modality adds nothing, which is different from renormalising over the rest, and what a modality said stands in
the output. Generalised additive models have this form (Hastie and Tibshirani 1986); the gates are ours.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from draf_dist.config.spec import Spec
from draf_dist.models.backbones import Backbones
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.layers import ModalityLinear, PresenceBits
from draf_dist.models.link import link_of
from draf_dist.models.mc import name_streams
from draf_dist.models.reliability import masked_softmax
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.modality import DataSchema


class GatedEvidenceConfig(Spec):
    """presence_bits adds B0 P to the logits: evidence that lies in what is missing."""

    kind: Literal["gated_evidence"] = "gated_evidence"
    width: int = Field(64, ge=1)
    encoders: EncoderChoice = EncoderChoice()
    presence_bits: bool = False

    def build(self, schema: DataSchema) -> "GatedEvidence":
        """The model for one data schema.

        Raises:
            SpecError: an encoder does not fit its modality.
        """
        model = GatedEvidence(self, schema)
        name_streams(model)
        return model


class GatedEvidence(nn.Module):
    """logits = b + sum over present m of sigmoid(a_m . h_m + c_m) (E_m h_m + e_m).

    Parameters beside the backbones: b (K,), M (dK + K) of the evidence, M (d + 1) of the gates, which start half open.
    """

    def __init__(self, config: GatedEvidenceConfig, schema: DataSchema) -> None:
        super().__init__()
        num_modalities, num_outputs = len(schema.modalities), schema.num_outputs
        self.link = link_of(schema.label)
        self.backbones = Backbones(config.encoders, schema, config.width)
        self.evidence = ModalityLinear(num_modalities, config.width, num_outputs)
        self.gates = ModalityLinear(num_modalities, config.width, 1)
        nn.init.zeros_(self.gates.bias)
        self.prior = nn.Parameter(torch.zeros(num_outputs))
        self.bits = PresenceBits(num_modalities, num_outputs) if config.presence_bits else None

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """Logits of S passes of a normalised batch; keys int64 (S, B).

        modality_logits: b + E_m h_m + e_m, what a modality would say alone with its gate open, so that the unimodal loss makes
        its evidence a log-likelihood ratio. reliability: the gates, mean over passes, divided by their sum over present.
        parts: evidence (B, M, K), what every modality added to the logits, and gate (B, M), both means over passes and 0 where
        absent. signals: gate_mean over present modalities; 0 is a model that ignores its input, 1 plain addition.
        """
        present = batch.present
        features = self.backbones(batch, keys)
        alone = self.evidence(features)
        gates = torch.where(present, self.gates(features).squeeze(-1).sigmoid(), 0.0)
        added = torch.where(present.unsqueeze(-1), gates.unsqueeze(-1) * alone, 0.0)
        modality_logits = self.prior + alone
        gate = gates.mean(0)
        measured = self.link.uncertainties(modality_logits.detach())
        logits = self.prior + added.sum(-2)
        return FusionOutput(
            logits=logits if self.bits is None else logits + self.bits(present),
            reliability=normalised_gates(gate, present),
            uncertainty={name: torch.where(present, value, 0.0) for name, value in measured.items()},
            features=features.mean(0),
            modality_logits=modality_logits,
            parts={"evidence": added.mean(0), "gate": gate},
            signals={"gate_mean": (gate.sum(1) / present.sum(1).clamp_min(1)).detach()},
        )


def normalised_gates(gate: Tensor, present: Tensor) -> Tensor:
    """gate_m / sum over present k of gate_k, from gates in (0, 1] and present (B, M); exactly 0 where absent."""
    return masked_softmax(gate.clamp_min(torch.finfo(gate.dtype).tiny).log(), present)
