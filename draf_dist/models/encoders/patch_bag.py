"""A bag of patches, pooled by gated attention (Ilse, Tomczak, Welling 2018): what a slide is made of, in no order."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.models.encoders.kinds import wrong_kind
from draf_dist.models.encoders.steps import counted_steps
from draf_dist.models.layers import Projection
from draf_dist.models.mc import MCDropout
from draf_dist.models.reliability import masked_softmax
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.modality import ModalitySpec, SeriesSpec


class PatchBagConfig(Spec):
    """Reads a series whose steps are patches and whose variables are the features that some network gave each of them."""

    kind: Literal["patch_bag"] = "patch_bag"
    hidden: int = Field(128, ge=1)
    attention: int = Field(64, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    projection_dropout: float = Field(0.2, ge=0, lt=1)

    def build(self, spec: ModalitySpec, width: int) -> "PatchBag":
        """The encoder of one series modality, with features of the given width.

        Raises:
            SpecError: the modality is of another kind.
        """
        if not isinstance(spec, SeriesSpec):
            raise wrong_kind(self.kind, reads="series", spec=spec)
        return PatchBag(self, spec, width)


class PatchBag(nn.Module):
    """SeriesInput (B, T, F), T patches at most, to (S, B, width); the order of the patches changes nothing.

    The order says nothing, but which patch has which place in memory must not decide what dropout does to it. So a draw drops one
    hidden feature of all patches at once (ours). A patch counts if it stands before the length and anything of it was observed.
    """

    def __init__(self, config: PatchBagConfig, spec: SeriesSpec, width: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(len(spec.variables), config.hidden)
        self.dropout = MCDropout(config.dropout, channels=True)
        self.attention = GatedAttention(config.hidden, config.attention)
        self.projection = Projection(config.hidden, width, config.projection_dropout)

    def forward(self, bag: SeriesInput, keys: Tensor) -> Tensor:
        """Features of every pass. An empty bag has the features of a zero vector, the same for all."""
        patches = functional.relu(self.embedding(bag.values)).unsqueeze(0)
        patches = self.dropout(patches.transpose(-1, -2), keys).transpose(-1, -2)
        weights = self.attention(patches, counted_steps(bag) & bag.observed.any(-1))
        features: Tensor = self.projection((weights.unsqueeze(-1) * patches).sum(-2), keys)
        return features

    def checkpointed_blocks(self) -> tuple[nn.Module, ...]:
        """See HasBlocks: two hidden layers of every patch and pass."""
        return (self.attention,)


class GatedAttention(nn.Module):
    """a_k = softmax_k w . (tanh(V h_k) * sigmoid(U h_k))   (Ilse et al. 2018, eq. 9; the biases of V and U are ours)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.content = nn.Linear(inputs, hidden)
        self.gate = nn.Linear(inputs, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, patches: Tensor, counts: Tensor) -> Tensor:
        """Weights (..., B, T) of patches (..., B, T, inputs): of those that count, bool (B, T), they sum to 1; else exactly 0."""
        gated = torch.tanh(self.content(patches)) * torch.sigmoid(self.gate(patches))
        return masked_softmax(self.score(gated).squeeze(-1), counts)
