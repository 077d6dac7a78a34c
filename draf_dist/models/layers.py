"""Layers that several models share. None has batch statistics: a row's output never depends on the other rows."""

import math

import torch
from torch import Tensor, nn

from draf_dist.models.mc import MCDropout


class Projection(nn.Module):
    """The end of every encoder: MC dropout, Linear, LayerNorm, so that widths and scales are equal (spec 1.1 row 7)."""

    def __init__(self, inputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = MCDropout(dropout)
        self.linear = nn.Linear(inputs, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, values: Tensor, keys: Tensor) -> Tensor:
        """Values (S or 1, B, inputs) to features (S, B, width)."""
        projected: Tensor = self.norm(self.linear(self.dropout(values, keys)))
        return projected.expand(keys.shape[0], -1, -1)


class ModalityLinear(nn.Module):
    """One Linear(width, outputs) per modality, M (width * outputs + outputs) parameters: (..., M, width) to (..., M, outputs)."""

    def __init__(self, num_modalities: int, width: int, outputs: int) -> None:
        super().__init__()
        # As nn.Linear starts: uniform within 1 / sqrt(width).
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(num_modalities, outputs, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_modalities, outputs).uniform_(-bound, bound))

    def forward(self, features: Tensor) -> Tensor:
        """Each modality through its own map; none sees another."""
        return torch.einsum("...mz,mkz->...mk", features, self.weight) + self.bias


class PresenceBits(nn.Module):
    """B0 P: what the pattern of presence adds (findings 4 and its gate: H + B0 P). Starts at 0, so at first it does nothing."""

    def __init__(self, num_modalities: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_modalities, outputs, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, present: Tensor) -> Tensor:
        """From present, bool (B, M), to (B, outputs)."""
        added: Tensor = self.linear(present.to(self.linear.weight.dtype))
        return added


class FusionHead(nn.Module):
    """g = Linear - ReLU - Linear over a fused vector, with presence bits added to it if asked for."""

    def __init__(self, inputs: int, hidden: int, num_classes: int, *, presence_bits: int = 0) -> None:
        """presence_bits: M, or 0 for none."""
        super().__init__()
        self.bits = PresenceBits(presence_bits, inputs) if presence_bits else None
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, fused: Tensor, present: Tensor) -> Tensor:
        """Fused (..., B, inputs) and present (B, M) to logits (..., B, K)."""
        return self.classify(fused if self.bits is None else fused + self.bits(present))

    def classify(self, features: Tensor) -> Tensor:
        """G alone, of any (..., inputs)."""
        logits: Tensor = self.layers(features)
        return logits

    def checkpointed_blocks(self) -> tuple[nn.Module, ...]:
        """See HasBlocks: of all passes and modalities it keeps the hidden layer otherwise."""
        return (self.layers,)
