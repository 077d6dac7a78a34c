"""A self-normalising network for wide tables: gene expression, methylation, any table of thousands of numbers."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.models.encoders.kinds import no_codes, wrong_kind
from draf_dist.models.layers import Projection
from draf_dist.models.mc import MCAlphaDropout
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.categories import category_counts
from draf_dist.schema.modality import ModalitySpec, TableSpec


class GenomicsConfig(Spec):
    """Layers of SELU and alpha dropout over z-scores (Klambauer et al. 2017); the sizes are ours."""

    kind: Literal["genomics"] = "genomics"
    hidden: int = Field(256, ge=1)
    layers: int = Field(2, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    projection_dropout: float = Field(0.2, ge=0, lt=1)

    def build(self, spec: ModalitySpec, width: int) -> "GenomicsEncoder":
        """The encoder of one table, with features of the given width.

        Raises:
            SpecError: the modality is of another kind, or holds codes.
        """
        if not isinstance(spec, TableSpec):
            raise wrong_kind(self.kind, reads="table", spec=spec)
        if codes := category_counts(spec):
            raise no_codes(self.kind, spec, codes)
        return GenomicsEncoder(self, spec, width)


class GenomicsEncoder(nn.Module):
    """SeriesInput (B, 1, F) to (S, B, width).

    What SELU and its starting weights keep at mean 0 and variance 1 is the activations of inputs of mean 0 and variance 1. Bits
    that say 1 nearly everywhere are no such inputs. So what was not observed enters as the training mean, 0, and adds a learned
    vector of its own, 0 at the start (ours): of a row that was measured in full nothing but the values is ever seen.
    """

    def __init__(self, config: GenomicsConfig, spec: TableSpec, width: int) -> None:
        super().__init__()
        inputs = len(spec.variables)
        self.layers = nn.ModuleList(
            lecun_linear(inputs if number == 0 else config.hidden, config.hidden) for number in range(config.layers)
        )
        self.unobserved = nn.Linear(inputs, config.hidden, bias=False)
        nn.init.zeros_(self.unobserved.weight)
        self.dropouts = nn.ModuleList(MCAlphaDropout(config.dropout) for _ in range(config.layers))
        self.projection = Projection(config.hidden, width, config.projection_dropout)

    def forward(self, table: SeriesInput, keys: Tensor) -> Tensor:
        """Features of every pass."""
        values, observed = table.values[:, 0], table.observed[:, 0]
        sums = self.layers[0](values) + self.unobserved((~observed).to(values.dtype))
        hidden = self.dropouts[0](functional.selu(sums).unsqueeze(0), keys)
        for layer, dropout in zip(self.layers[1:], self.dropouts[1:], strict=True):
            hidden = dropout(functional.selu(layer(hidden)), keys)
        features: Tensor = self.projection(hidden, keys)
        return features


def lecun_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts from N(0, 1 / inputs) and biases of 0: it keeps the variance (LeCun et al. 1998)."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        nn.init.normal_(layer.weight, std=1 / math.sqrt(max(inputs, 1)))
        nn.init.zeros_(layer.bias)
    return layer
