"""An MLP over one row of values, binary codes (multi-hot) and embedded codes among them, and what of it was observed."""

import difflib
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.models.encoders.kinds import wrong_kind
from draf_dist.models.layers import Projection
from draf_dist.models.mc import MCDropout
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.categories import category_counts
from draf_dist.schema.modality import ModalitySpec, TableSpec


class TabularConfig(Spec):
    """Two hidden layers over [values, observed bits] and, of columns that hold codes, a learned vector of each code.

    Columns that the release calls categorical hold codes. codes: column -> n, others that hold whole numbers 0 .. n - 1 that name
    something. embedding: width of their vectors.
    """

    kind: Literal["tabular"] = "tabular"
    hidden: int = Field(128, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    projection_dropout: float = Field(0.2, ge=0, lt=1)
    # Left out of the stored form where they are not set: jobs from before there was such a thing keep their names.
    codes: dict[str, Annotated[int, Field(ge=2)]] = Field({}, exclude_if=lambda codes: not codes)
    embedding: int = Field(8, ge=1, exclude_if=lambda width: width == 8)

    def build(self, spec: ModalitySpec, width: int) -> "TabularEncoder":
        """The encoder of one table, with features of the given width.

        Raises:
            SpecError: the modality is of another kind, or a column of `codes` is not there or holds no codes.
        """
        if not isinstance(spec, TableSpec):
            raise wrong_kind(self.kind, reads="table", spec=spec)
        self._check_codes(spec)
        return TabularEncoder(self, spec, width)

    def _check_codes(self, spec: TableSpec) -> None:
        types, counts = {variable.name: variable.type for variable in spec.variables}, category_counts(spec)
        for name in self.codes:
            where = f"model.encoders: {self.kind} for {spec.name}: codes"
            if name not in types:
                near = difflib.get_close_matches(name, types, n=1)
                remedy = f"Did you mean {near[0]!r}?" if near else "See schema.json of the release."
                raise SpecError(explain(where, expected="columns of the table", found=repr(name), remedy=remedy))
            if name in counts and self.codes[name] != counts[name]:
                found = f"{name}, of {counts[name]} categories"
                remedy = "Leave it out: the release says how many there are."
                raise SpecError(explain(where, expected=f"{self.codes[name]} codes", found=found, remedy=remedy))
            if types[name] == "numeric":
                # Of a z-score nobody can say which code it was.
                remedy = "Numeric columns are standardised on their way to a model; leave it out."
                raise SpecError(explain(where, expected="columns that are no numbers", found=f"{name}, numeric", remedy=remedy))


class TabularEncoder(nn.Module):
    """SeriesInput (B, 1, F) to (S, B, width). A code that is 0 and one that was not observed are told apart by the bits."""

    def __init__(self, config: TabularConfig, spec: TableSpec, width: int) -> None:
        super().__init__()
        names = [variable.name for variable in spec.variables]
        codes = config.codes | category_counts(spec)
        self.codes = CodeEmbedding(names, codes, config.embedding) if codes else None
        embedded = len(codes)
        self.input = nn.Linear(2 * (len(names) - embedded) + embedded * config.embedding, config.hidden)
        self.norm = nn.LayerNorm(config.hidden)
        self.dropout = MCDropout(config.dropout)
        self.hidden = nn.Linear(config.hidden, config.hidden)
        self.projection = Projection(config.hidden, width, config.projection_dropout)

    def forward(self, table: SeriesInput, keys: Tensor) -> Tensor:
        """Features of every pass."""
        values, observed = table.values[:, 0], table.observed[:, 0]
        row = torch.cat([values, observed.to(values.dtype)], dim=-1) if self.codes is None else self.codes(values, observed)
        hidden = self.dropout(functional.gelu(self.norm(self.input(row))).unsqueeze(0), keys)
        features: Tensor = self.projection(functional.gelu(self.hidden(hidden)), keys)
        return features


class CodeEmbedding(nn.Module):
    """A vector for every code of every column that holds codes, and one for "not known" (Guo and Berkhahn 2016; that one is ours).

    sum (n_c + 1) parameters times the width. Not known is what was not observed and what is none of 0 .. n_c - 1.
    """

    columns: Tensor
    others: Tensor
    counts: Tensor
    first: Tensor

    def __init__(self, names: list[str], codes: dict[str, int], width: int) -> None:
        """names: of all columns, in order."""
        super().__init__()
        counts = torch.tensor([codes[name] for name in names if name in codes])
        self.table = nn.Embedding(sum(codes.values()) + len(codes), width)
        # Not saved: they follow from the config.
        held = {
            "columns": torch.tensor([at for at, name in enumerate(names) if name in codes]),
            "others": torch.tensor([at for at, name in enumerate(names) if name not in codes], dtype=torch.int64),
            "counts": counts,
            "first": torch.cumsum(counts + 1, 0) - counts - 1,
        }
        for name, values in held.items():
            self.register_buffer(name, values, persistent=False)

    def forward(self, values: Tensor, observed: Tensor) -> Tensor:
        """A row (B, F) of values and observed bits to [values, observed bits, vectors], the first two of the other columns."""
        codes, known = values[:, self.columns], observed[:, self.columns]
        known = known & (codes >= 0) & (codes < self.counts) & (codes == codes.floor())
        # Row 0 of a column's vectors is that of "not known".
        rows = self.first + torch.where(known, codes + 1, 0.0).long()
        vectors = self.table(rows).flatten(1)
        return torch.cat([values[:, self.others], observed[:, self.others].to(values.dtype), vectors], dim=1)
