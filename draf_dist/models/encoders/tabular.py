"""An MLP over one row of values, binary codes (multi-hot) among them, and what of it was observed."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.models.encoders.kinds import wrong_kind
from draf_dist.models.layers import Projection
from draf_dist.models.mc import MCDropout
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.modality import ModalitySpec, TableSpec


class TabularConfig(Spec):
    """Two hidden layers over [values, observed bits]."""

    kind: Literal["tabular"] = "tabular"
    hidden: int = Field(128, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    projection_dropout: float = Field(0.2, ge=0, lt=1)

    def build(self, spec: ModalitySpec, width: int) -> "TabularEncoder":
        """The encoder of one table, with features of the given width.

        Raises:
            SpecError: the modality is of another kind.
        """
        if not isinstance(spec, TableSpec):
            raise wrong_kind(self.kind, reads="table", spec=spec)
        return TabularEncoder(self, spec, width)


class TabularEncoder(nn.Module):
    """SeriesInput (B, 1, F) to (S, B, width). A code that is 0 and one that was not observed are told apart by the bits."""

    def __init__(self, config: TabularConfig, spec: TableSpec, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(2 * len(spec.variables), config.hidden)
        self.norm = nn.LayerNorm(config.hidden)
        self.dropout = MCDropout(config.dropout)
        self.hidden = nn.Linear(config.hidden, config.hidden)
        self.projection = Projection(config.hidden, width, config.projection_dropout)

    def forward(self, table: SeriesInput, keys: Tensor) -> Tensor:
        """Features of every pass."""
        row = torch.cat([table.values, table.observed.to(table.values.dtype)], dim=-1)[:, 0]
        hidden = self.dropout(functional.gelu(self.norm(self.input(row))).unsqueeze(0), keys)
        features: Tensor = self.projection(functional.gelu(self.hidden(hidden)), keys)
        return features
