"""A transformer for timed values on a grid, with attention of our own so that MC dropout is on (rule D5)."""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.models.encoders.kinds import wrong_kind
from draf_dist.models.encoders.steps import counted_steps, masked_mean
from draf_dist.models.layers import Projection
from draf_dist.models.mc import MCDropout, per_pass
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.modality import ModalitySpec, SeriesSpec


class SeriesTransformerConfig(Spec):
    """Linear embedding of values and observed bits, learned positions, pre-norm blocks, masked mean over the steps that count."""

    kind: Literal["series_transformer"] = "series_transformer"
    hidden: int = Field(64, ge=1)
    heads: int = Field(4, ge=1)
    blocks: int = Field(2, ge=1)
    mlp_ratio: int = Field(2, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    projection_dropout: float = Field(0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) is not a multiple of heads ({self.heads})")
        return self

    def build(self, spec: ModalitySpec, width: int) -> "SeriesTransformer":
        """The encoder of one series modality, with features of the given width.

        Raises:
            SpecError: the modality is of another kind.
        """
        if not isinstance(spec, SeriesSpec):
            raise wrong_kind(self.kind, reads="series", spec=spec)
        return SeriesTransformer(self, spec, width)


class SeriesTransformer(nn.Module):
    """SeriesInput (B, T, F) to (S, B, width)."""

    def __init__(self, config: SeriesTransformerConfig, spec: SeriesSpec, width: int) -> None:
        super().__init__()
        self.hidden = config.hidden
        self.embedding = nn.Linear(2 * len(spec.variables), config.hidden)
        self.positions = nn.Parameter(0.02 * torch.randn(spec.num_steps, config.hidden))
        self.blocks = nn.ModuleList(AttentionBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.hidden)
        self.projection = Projection(config.hidden, width, config.projection_dropout)

    def forward(self, series: SeriesInput, keys: Tensor) -> Tensor:
        """Features of every pass."""
        return self.pool(self.tokens(series, keys), series, keys)

    def tokens(self, series: SeriesInput, keys: Tensor) -> Tensor:
        """What is known at every step: (S or 1, B, T, hidden); steps past the length hold what nobody attends to."""
        values = torch.cat([series.values, series.observed.to(series.values.dtype)], dim=-1)
        hidden = (self.embedding(values) + self.positions).unsqueeze(0)
        # A row without a step attends to its zeros: a softmax over nothing is NaN in some kernels of SDPA, 0 in others.
        attended = counted_steps(series) | (series.length == 0).unsqueeze(1)
        for block in self.blocks:
            hidden = block(hidden, attended, keys)
        tokens: Tensor = self.norm(hidden)
        return tokens

    def pool(self, tokens: Tensor, series: SeriesInput, keys: Tensor) -> Tensor:
        """Features (S, B, width) of the tokens of this series."""
        features: Tensor = self.projection(masked_mean(tokens, counted_steps(series)), keys)
        return features

    def checkpointed_blocks(self) -> nn.ModuleList:
        """See HasBlocks."""
        return self.blocks


class AttentionBlock(nn.Module):
    """x + drop(attention(norm x)), then x + MLP(norm x) with dropout after its activation. SDPA itself has dropout 0."""

    def __init__(self, config: SeriesTransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(hidden)
        self.queries_keys_values = nn.Linear(hidden, 3 * hidden)
        self.output = nn.Linear(hidden, hidden)
        self.dropout1 = MCDropout(config.dropout)
        self.norm2 = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, config.mlp_ratio * hidden)
        self.dropout2 = MCDropout(config.dropout)
        self.contract = nn.Linear(config.mlp_ratio * hidden, hidden)

    def forward(self, hidden: Tensor, attended: Tensor, keys: Tensor) -> Tensor:
        """Tokens (S or 1, B, T, hidden); attended bool (B, T) marks what may be looked at."""
        passes = hidden.shape[0]
        mask = attended[:, None, None, :].repeat(passes, 1, 1, 1)
        hidden = hidden + self.dropout1(per_pass(lambda flat: self.attend(flat, mask), self.norm1(hidden)), keys)
        widened = functional.gelu(self.expand(self.norm2(hidden)))
        result: Tensor = hidden + self.contract(self.dropout2(widened, keys))
        return result

    def attend(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Self-attention of (N, T, hidden) under a bool mask (N, 1, 1, T)."""
        rows, steps, hidden = tokens.shape
        parts = self.queries_keys_values(tokens).view(rows, steps, 3, self.heads, hidden // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=0.0)
        result: Tensor = self.output(mixed.transpose(1, 2).reshape(rows, steps, hidden))
        return result
