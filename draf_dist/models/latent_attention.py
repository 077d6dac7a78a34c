"""A latent array that reads one modality after the other by cross-attention (HEALNet, arXiv 2311.09115v3; spec 4.5).

The paper's: the equations, the order of the steps, what is shared by tied layers, every size. Ours: the whole step of an absent
modality is skipped per study (as the paper means it; the published code does so only when it is verbose, spec 4.5 defect a), a mask
of tokens per modality (defect g), any number of self-attentions (defect d), no parameters without a gradient for single tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.models.mc import MCDropout, per_pass

# The published softmax divides its scaled scores by this.
_TEMPERATURE = 0.5


class LatentAttentionConfig(Spec):
    """Sizes; the defaults are the paper's, but for dropout (there 0, and then all passes agree).

    latents, width: l_c and l_d of the latent array. heads, head_width: of every attention. self_per_cross_attn: latent
    self-attentions after every modality. snn: the gate of the feed-forward step is SELU, else GELU. weight_tie_layers: all layers
    but the first share their parameters, and in these one feed-forward step serves all modalities.
    """

    depth: int = Field(3, ge=1)
    latents: int = Field(128, ge=1)
    width: int = Field(128, ge=1)
    heads: int = Field(8, ge=1)
    head_width: int = Field(64, ge=1)
    self_per_cross_attn: int = Field(1, ge=0)
    weight_tie_layers: bool = False
    snn: bool = True
    dropout: float = Field(0.1, ge=0, lt=1)


@dataclass(frozen=True)
class TokenSpec:
    """The tokens of one modality: their width D_m, and N_m if it is the same for all studies (only 1 makes a difference)."""

    width: int
    number: int | None = None


@dataclass(frozen=True)
class Tokens:
    """values: (B, N, D). attended: bool (B, N), which of them are there; None: all. A row without any may hold anything finite."""

    values: Tensor
    attended: Tensor | None = None


@dataclass(frozen=True)
class Latents:
    """state: (S, B, latents, width), and how the steps of the first pass went: (B, M), 0 where absent, without gradient.

    change: mean over layers of |step| / |state before it|. entropy, most: in nats, of the attention of the last layer, mean over
    heads and latents, and of equal attention to all tokens.
    """

    state: Tensor
    change: Tensor
    entropy: Tensor
    most: Tensor


@dataclass(frozen=True)
class FourierCode:
    """Where a token lies on a grid: sin(pi s x), cos(pi s x) and x of every axis.

    Of n cells x = linspace(-1, 1, n), and s = linspace(1, max_freq / 2, bands).
    """

    bands: int = 2
    max_freq: float = 10.0

    def width(self, channels: int, axes: int) -> int:
        """D_m = c_m + a_m (2 bands + 1): of tokens of c_m channels that carry their place on a axes."""
        return channels + axes * (2 * self.bands + 1)

    def beside(self, values: Tensor, sides: Sequence[int]) -> Tensor:
        """Tokens (B, N, C) of a grid, its last axis counted fastest, to (B, N, D)."""
        axes = [self._axis(side, values) for side in sides]
        places = torch.meshgrid(*(torch.arange(side, device=values.device) for side in sides), indexing="ij")
        code = torch.cat([axis[place.flatten()] for axis, place in zip(axes, places, strict=True)], dim=-1)
        return torch.cat([values, code.expand(values.shape[0], -1, -1)], dim=-1)

    def _axis(self, side: int, like: Tensor) -> Tensor:
        """The code (n, 2 bands + 1) of one axis."""
        place = torch.linspace(-1, 1, side, device=like.device, dtype=like.dtype).unsqueeze(-1)
        scale = torch.linspace(1, self.max_freq / 2, self.bands, device=like.device, dtype=like.dtype)
        angle = math.pi * scale * place
        return torch.cat([angle.sin(), angle.cos(), place], dim=-1)


class Attention(nn.Module):
    """softmax((q k^T / sqrt(d_h)) / 0.5) v over tokens, then Linear and LeakyReLU(0.01); q, k, v have no bias."""

    def __init__(self, width: int, token_width: int, config: LatentAttentionConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.scale = 1 / (math.sqrt(config.head_width) * _TEMPERATURE)
        self.queries = nn.Linear(width, inner, bias=False)
        self.keys_values = nn.Linear(token_width, 2 * inner, bias=False)
        self.output = nn.Linear(inner, width)

    def forward(self, latents: Tensor, tokens: Tensor, attended: Tensor | None) -> Tensor:
        """Latents (N, L, width), tokens (N, T, token_width) and attended, bool (N, T), to (N, L, width)."""
        queries, (keys, values) = self._split(self.queries(latents)), self._keys_values(tokens)
        mask = None if attended is None else attended[:, None, None, :]
        # SDPA has no dropout of its own here (rule D5).
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scale)
        return functional.leaky_relu(self.output(mixed.transpose(1, 2).flatten(2)), 0.01)

    def entropy(self, latents: Tensor, tokens: Tensor, attended: Tensor | None) -> Tensor:
        """Entropy (N,) in nats of the attention, mean over heads and latents."""
        scores = self._split(self.queries(latents)) @ self._keys_values(tokens)[0].transpose(-1, -2) * self.scale
        if attended is not None:
            scores = scores.masked_fill(~attended[:, None, None, :], -math.inf)
        weights = scores.softmax(-1)
        return -torch.xlogy(weights, weights).sum(-1).mean((1, 2))

    def _split(self, values: Tensor) -> Tensor:
        # Sizes in full: a rank may have no row, of which a -1 would mean anything.
        return values.view(*values.shape[:2], self.heads, values.shape[2] // self.heads).transpose(1, 2)

    def _keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys_values(tokens).chunk(2, dim=-1)
        return self._split(keys), self._split(values)


class CrossStep(nn.Module):
    """CrossAttn(LN S, LN X) of one modality with many tokens."""

    def __init__(self, token_width: int, config: LatentAttentionConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.token_norm = nn.LayerNorm(token_width)
        self.attention = Attention(config.width, token_width, config)

    def forward(self, state: Tensor, tokens: Tensor, attended: Tensor | None) -> Tensor:
        """State (S or 1, B, L, width) and tokens (B, N, D) to what is added to the state."""
        passes, rows, number, _ = state.shape
        # Passes share their tokens: they stand side by side as latents, so that keys and values are made once.
        latents = self.norm(state).transpose(0, 1).flatten(1, 2)
        added: Tensor = self.attention(latents, self.token_norm(tokens), _or_all(attended))
        return added.view(rows, passes, number, state.shape[3]).transpose(0, 1)

    @torch.no_grad()
    def entropy(self, state: Tensor, tokens: Tensor, attended: Tensor | None) -> Tensor:
        """Of the attention of the first pass, (B,)."""
        return self.attention.entropy(self.norm(state[0]), self.token_norm(tokens), _or_all(attended))


class SingleTokenStep(nn.Module):
    """What CrossStep is for a modality of one token: softmax over one score is 1, whatever is asked.

    The same function with the queries, the keys and LN S left out, which no gradient could ever reach (rule D2).
    """

    def __init__(self, token_width: int, config: LatentAttentionConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_width
        self.token_norm = nn.LayerNorm(token_width)
        self.values = nn.Linear(token_width, inner, bias=False)
        self.output = nn.Linear(inner, config.width)

    def forward(self, state: Tensor, tokens: Tensor, attended: Tensor | None) -> Tensor:
        """Tokens (B, 1, D) to what is added to every latent of a state (S or 1, B, L, width)."""
        added = functional.leaky_relu(self.output(self.values(self.token_norm(tokens))), 0.01)
        return added.unsqueeze(0).expand_as(state)

    def entropy(self, state: Tensor, tokens: Tensor, attended: Tensor | None) -> Tensor:
        """Of a choice of one: 0."""
        return state.new_zeros(state.shape[1])


class SelfStep(nn.Module):
    """SelfAttn(LN S) among the latents of one pass and study."""

    def __init__(self, config: LatentAttentionConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.width, config)

    def forward(self, state: Tensor) -> Tensor:
        """State (S or 1, B, L, width) to what is added to it."""
        return per_pass(lambda flat: self.attention(flat, flat, None), self.norm(state))


class FeedForwardStep(nn.Module):
    """FF(LN S): Linear to 8 widths in two halves (a, b), a * selu(b) (`snn`) or a * gelu(b), Linear back, MC dropout."""

    def __init__(self, config: LatentAttentionConfig) -> None:
        super().__init__()
        self.gate = functional.selu if config.snn else functional.gelu
        self.norm = nn.LayerNorm(config.width)
        self.expand = nn.Linear(config.width, 8 * config.width)
        self.contract = nn.Linear(4 * config.width, config.width)
        self.dropout = MCDropout(config.dropout)

    def forward(self, state: Tensor, keys: Tensor) -> Tensor:
        """State (S or 1, B, L, width) to what is added to it in every pass of keys (S, B)."""
        values, gates = self.expand(self.norm(state)).chunk(2, dim=-1)
        added: Tensor = self.dropout(self.contract(values * self.gate(gates)), keys)
        return added


class LatentLayer(nn.Module):
    """One step per modality, in their order: S += CrossAttn_m; S += FF_m; then, after each, S += SelfAttn; S += FF.

    one_mlp: FF_m is the same for all modalities.
    """

    def __init__(self, tokens: Sequence[TokenSpec], config: LatentAttentionConfig, *, one_mlp: bool) -> None:
        super().__init__()
        self.cross = nn.ModuleList(_cross_step(spec, config) for spec in tokens)
        self.cross_mlp = nn.ModuleList(FeedForwardStep(config) for _ in (tokens[:1] if one_mlp else tokens))
        self.within = nn.ModuleList(SelfStep(config) for _ in range(config.self_per_cross_attn))
        self.within_mlp = nn.ModuleList(FeedForwardStep(config) for _ in range(config.self_per_cross_attn))

    def forward(self, state: Tensor, axis: int, tokens: Tokens, keys: Tensor) -> Tensor:
        """The state (S or 1, B, L, width) once the modality at `axis` was read."""
        state = state + self.cross[axis](state, tokens.values, tokens.attended)
        state = state + self.cross_mlp[min(axis, len(self.cross_mlp) - 1)](state, keys)
        for attention, mlp in zip(self.within, self.within_mlp, strict=True):
            state = state + attention(state)
            state = state + mlp(state, keys)
        return state

    def entropy(self, state: Tensor, axis: int, tokens: Tokens) -> Tensor:
        """Of the attention that the modality at `axis` gets, (B,)."""
        step = self.cross[axis]
        assert isinstance(step, CrossStep | SingleTokenStep)
        return step.entropy(state, tokens.values, tokens.attended)

    def checkpointed_blocks(self) -> list[nn.Module]:
        """See HasBlocks: scores of all tokens, and activations of 8 widths."""
        return [*self.cross, *self.cross_mlp, *self.within, *self.within_mlp]


class LatentAttention(nn.Module):
    """Tokens of M modalities to K logits: `depth` layers over a learned latent array, mean over the latents, LN, Linear.

    The array starts from N(0, 1). With I = heads * head_width and n = self_per_cross_attn a layer has
        sum_m (2 l_d I + 2 D_m I + 3 l_d + 2 D_m) + (M + n) (12 l_d^2 + 11 l_d) + n (4 l_d I + 3 l_d)
    parameters, and the rest l_c l_d + 2 l_d + l_d K + K. A modality of one token saves l_d I + D_m I + 2 l_d a layer.
    """

    def __init__(self, tokens: Sequence[TokenSpec], num_outputs: int, config: LatentAttentionConfig) -> None:
        super().__init__()
        self.depth = config.depth
        self.start = nn.Parameter(torch.randn(config.latents, config.width))
        own = min(config.depth, 2) if config.weight_tie_layers else config.depth
        self.layers = nn.ModuleList(
            LatentLayer(tokens, config, one_mlp=config.weight_tie_layers and index > 0) for index in range(own)
        )
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, num_outputs)

    def forward(self, tokens: Sequence[Tokens], present: Tensor, keys: Tensor) -> Latents:
        """The latents after all layers; present bool (B, M), keys int64 (S, B). A row without any modality keeps the start."""
        state = self.start.expand(1, present.shape[0], -1, -1)
        changes: list[Tensor] = []
        entropies: list[Tensor] = []
        for index in range(self.depth):
            layer = self._layer(index)
            for axis, read in enumerate(tokens):
                if index == self.depth - 1:
                    entropies.append(layer.entropy(state, axis, read))
                # The whole step of an absent modality is left out, but every rank computes it (rule D1).
                after = torch.where(present[:, axis, None, None], layer(state, axis, read, keys), state)
                changes.append(_relative(state.detach(), after.detach()))
                state = after
        return Latents(
            state=state.expand(keys.shape[0], -1, -1, -1),
            change=torch.stack(changes).view(self.depth, *present.T.shape).mean(0).transpose(0, 1),
            entropy=torch.where(present, torch.stack(entropies, dim=1), 0.0),
            most=_most(tokens, present),
        )

    def _layer(self, index: int) -> LatentLayer:
        layer = self.layers[min(index, len(self.layers) - 1)]
        assert isinstance(layer, LatentLayer)
        return layer

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits (..., K) of the mean latent (..., width)."""
        logits: Tensor = self.output(self.norm(pooled))
        return logits


def _cross_step(spec: TokenSpec, config: LatentAttentionConfig) -> nn.Module:
    return SingleTokenStep(spec.width, config) if spec.number == 1 else CrossStep(spec.width, config)


def _or_all(attended: Tensor | None) -> Tensor | None:
    """A row without a token attends to what stands there: a softmax over nothing is NaN in some kernels, 0 in others."""
    return None if attended is None else attended | ~attended.any(1, keepdim=True)


def _relative(before: Tensor, after: Tensor) -> Tensor:
    """|after - before| / |before| in the first pass: (B,)."""
    moved, size = (values[0].square().sum((-2, -1)).sqrt() for values in (after - before, before))
    return moved / size.clamp_min(1e-12)


def _most(tokens: Sequence[Tokens], present: Tensor) -> Tensor:
    """Log of the number of tokens that are there, (B, M)."""
    everything = [read.values.new_ones(read.values.shape[:2]) if read.attended is None else read.attended for read in tokens]
    counts = torch.stack([there.sum(1) for there in everything], dim=1)
    return torch.where(present, counts.clamp_min(1).log(), 0.0)
