"""A GRU over a series, written out so that nothing in it drops by a flag of its own (rule D5)."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.models.encoders.kinds import wrong_kind
from draf_dist.models.encoders.steps import counted_steps, masked_mean
from draf_dist.models.layers import Projection
from draf_dist.models.mc import MCDropout
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.modality import ModalitySpec, SeriesSpec


class GruConfig(Spec):
    """One layer over [values, observed bits], MC dropout on its output, masked mean over the steps that count (spec 1.2)."""

    kind: Literal["gru"] = "gru"
    hidden: int = Field(128, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    projection_dropout: float = Field(0.2, ge=0, lt=1)

    def build(self, spec: ModalitySpec, width: int) -> "GruEncoder":
        """The encoder of one series modality, with features of the given width.

        Raises:
            SpecError: the modality is of another kind.
        """
        if not isinstance(spec, SeriesSpec):
            raise wrong_kind(self.kind, reads="series", spec=spec)
        return GruEncoder(self, spec, width)


class GruEncoder(nn.Module):
    """SeriesInput (B, T, F) to (S, B, width). The recurrence runs once, whatever S: what is drawn comes after it."""

    def __init__(self, config: GruConfig, spec: SeriesSpec, width: int) -> None:
        super().__init__()
        self.hidden = config.hidden
        self.recurrence = Recurrence(2 * len(spec.variables), config.hidden)
        self.dropout = MCDropout(config.dropout)
        self.projection = Projection(config.hidden, width, config.projection_dropout)

    def forward(self, series: SeriesInput, keys: Tensor) -> Tensor:
        """Features of every pass."""
        return self.pool(self.tokens(series, keys), series, keys)

    def tokens(self, series: SeriesInput, keys: Tensor) -> Tensor:
        """The state after every step, (S or 1, B, T, hidden); past the length it stays as it was."""
        values = torch.cat([series.values, series.observed.to(series.values.dtype)], dim=-1)
        states = self.recurrence(values, counted_steps(series))
        dropped: Tensor = self.dropout(states.unsqueeze(0), keys)
        return dropped

    def pool(self, tokens: Tensor, series: SeriesInput, keys: Tensor) -> Tensor:
        """Features (S, B, width) of the tokens of this series."""
        features: Tensor = self.projection(masked_mean(tokens, counted_steps(series)), keys)
        return features

    def checkpointed_blocks(self) -> tuple[nn.Module, ...]:
        """See HasBlocks: of every step it keeps some ten tensors otherwise."""
        return (self.recurrence,)


class Recurrence(nn.Module):
    """A GRU (Cho et al. 2014) with the reset gate after the product, as torch and cuDNN have it; 3H (I + H) + 6H parameters.

    r = s(W_r x + b_r + V_r h + c_r);  z = s(W_z x + b_z + V_z h + c_z);  n = tanh(W_n x + b_n + r * (V_n h + c_n));
    h' = (1 - z) n + z h, from h = 0. The rows of each parameter are those of r, z, n, one after another.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        # As nn.GRU starts: uniform within 1 / sqrt(hidden).
        bound = 1 / math.sqrt(hidden)
        self.input_weight = nn.Parameter(torch.empty(3 * hidden, inputs).uniform_(-bound, bound))
        self.hidden_weight = nn.Parameter(torch.empty(3 * hidden, hidden).uniform_(-bound, bound))
        self.input_bias = nn.Parameter(torch.empty(3 * hidden).uniform_(-bound, bound))
        self.hidden_bias = nn.Parameter(torch.empty(3 * hidden).uniform_(-bound, bound))

    def forward(self, values: Tensor, counts: Tensor) -> Tensor:
        """The states (B, T, H) after every step of values (B, T, I); a step that does not count (B, T) changes none."""
        state = values.new_zeros(values.shape[0], self.hidden_weight.shape[1])
        states = []
        # The products with the inputs need no state, so they are one product for all steps.
        of_inputs = functional.linear(values, self.input_weight, self.input_bias)
        for step, of_input in enumerate(of_inputs.unbind(1)):
            state = torch.where(counts[:, step, None], self.step(of_input, state), state)
            states.append(state)
        return torch.stack(states, dim=1)

    def step(self, of_input: Tensor, state: Tensor) -> Tensor:
        """The state (B, H) after one more step, of which W x + b (B, 3H) is known."""
        reset_in, update_in, new_in = of_input.chunk(3, dim=-1)
        reset_by, update_by, new_by = functional.linear(state, self.hidden_weight, self.hidden_bias).chunk(3, dim=-1)
        update = torch.sigmoid(update_in + update_by)
        new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_by) * new_by)
        return new + update * (state - new)
