"""DrFuse: what modalities share and what each has alone, weighed anew for every label (arXiv 2403.06197, AAAI 2024; spec 4.6).

The paper's (by its code): shared and distinct features, the shared projection, pooling of shared features as logits, attention of
every label, the heads; with two modalities, a series and an image, exactly so. Ours: any number of modalities, any of which may be
absent; classes and hazards for labels; encoders of this project (`trunks` gives the published ones); weights of modalities.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.models.absent import clear_absent, mask_absent
from draf_dist.models.backbones import Backbones, module_name
from draf_dist.models.drfuse_trunks import TrunksConfig
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.layers import ModalityLinear, PresenceBits
from draf_dist.models.link import link_of
from draf_dist.models.mc import name_streams
from draf_dist.models.uncertainty import entropy
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.modality import DataSchema


class DrfuseConfig(Spec):
    """width: d, 256 in the paper. trunks: the published encoders, for images and series; without them `encoders`, each twice."""

    kind: Literal["drfuse"] = "drfuse"
    width: int = Field(64, ge=1)
    encoders: EncoderChoice = EncoderChoice()
    trunks: TrunksConfig | None = None
    presence_bits: bool = False

    def build(self, schema: DataSchema) -> "Drfuse":
        """The model for one data schema.

        Raises:
            SpecError: an encoder or a trunk does not fit its modality.
        """
        model = Drfuse(self, schema)
        name_streams(model)
        return model


class EncodersTwice(nn.Module):
    """One encoder of each modality for its shared features and one for its distinct ones."""

    def __init__(self, choice: EncoderChoice, schema: DataSchema, width: int) -> None:
        super().__init__()
        self.shared = Backbones(choice, schema, width)
        self.distinct = Backbones(choice, schema, width)

    def forward(self, batch: Batch, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Shared and distinct features, (S, B, M, Z) each, 0 where absent."""
        return self.shared(batch, keys), self.distinct(batch, keys)


class Trunks(nn.Module):
    """The published encoder of each modality, which gives both."""

    def __init__(self, config: TrunksConfig, schema: DataSchema, width: int) -> None:
        super().__init__()
        self.names = schema.names
        self.trunks = nn.ModuleDict({module_name(spec.name): config.build(spec, width) for spec in schema.modalities})

    def forward(self, batch: Batch, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Shared and distinct features, (S, B, M, Z) each, 0 where absent."""
        inputs = clear_absent(batch)
        both = [self.trunks[module_name(name)](inputs[name], keys) for name in self.names]
        shared, distinct = (mask_absent(torch.stack(parts, dim=2), batch.present) for parts in zip(*both, strict=True))
        return shared, distinct


@dataclass(frozen=True)
class Disentangled:
    """What DrFuse makes of features; S passes, T = M + 1 tokens, the last of them shared.

    shared: (S, B, M, Z) of each modality, after the projection; where absent, that of zeros. pooled: (S, B, Z). attention:
    (S, B, K, T), sums to 1 over T, 0 where absent. logits, shared_logits: (S, B, K). distinct_logits: (S, B, M, K).
    """

    shared: Tensor
    pooled: Tensor
    attention: Tensor
    logits: Tensor
    shared_logits: Tensor
    distinct_logits: Tensor


class DrfuseCore(nn.Module):
    """From shared and distinct features to all predictions.

    Parameters: 5 d^2 + 4 d of the projection (d - 2d - d - d, one for all modalities), (K + 2) (d^2 + d) of the attention,
    (M + 2) (d K + K) of the heads.
    """

    def __init__(self, num_modalities: int, width: int, num_outputs: int, *, presence_bits: bool = False) -> None:
        super().__init__()
        sizes = (width, 2 * width, width, width)
        layers = [nn.Linear(inputs, outputs) for inputs, outputs in zip(sizes, sizes[1:], strict=False)]
        self.projection = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.attention = OutputAttention(width, num_outputs)
        self.bits = PresenceBits(num_modalities, width) if presence_bits else None
        self.distinct_heads = ModalityLinear(num_modalities, width, num_outputs)
        self.shared_head = nn.Linear(width, num_outputs)
        # A Linear(d, K) of which label k takes row k, of features of its own.
        self.head = ModalityLinear(num_outputs, width, 1)

    def forward(self, shared: Tensor, distinct: Tensor, present: Tensor) -> Disentangled:
        """Features (S, B, M, Z) each; present bool (B, M)."""
        shared = self.projection(shared)
        pooled = pool_logits(shared, present)
        tokens = torch.cat([distinct, pooled.unsqueeze(2)], dim=2)
        # The shared token is there even where no modality is: a softmax over nothing has no value.
        there = functional.pad(present, (0, 1), value=True)
        attention, features = self.attention(tokens, there)
        if self.bits is not None:
            features = features + self.bits(present).unsqueeze(1)
        return Disentangled(
            shared=shared,
            pooled=pooled,
            attention=attention,
            logits=self.head(features).squeeze(-1),
            shared_logits=self.shared_head(pooled),
            distinct_logits=self.distinct_heads(distinct),
        )


class OutputAttention(nn.Module):
    """Every token has a query, a value and a key for each of K labels; the query of a study is the mean over its tokens.

    a_k = softmax over the tokens that are there of q . key_k / sqrt(d); the features of label k are sum_t a_kt v_t.
    """

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.width, self.outputs = width, num_outputs
        self.linear = nn.Linear(width, (num_outputs + 2) * width)

    def forward(self, tokens: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (S, B, T, Z) and there, bool (B, T), to attention (S, B, K, T) and features (S, B, K, Z)."""
        parts = self.linear(tokens).unflatten(3, (self.outputs + 2, self.width))
        queries, values, keys = parts[:, :, :, 0], parts[:, :, :, 1], parts[:, :, :, 2:]
        shares = (there / there.sum(1, keepdim=True)).unsqueeze(-1)
        query = (shares * queries).sum(2)
        scores = torch.einsum("sbz,sbtkz->sbkt", query, keys) / self.width**0.5
        # In f32 at least: under autocast the weights would not sum to 1.
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        attention = wide.masked_fill(~there.unsqueeze(1), -torch.inf).softmax(-1)
        return attention, attention @ values


def pool_logits(values: Tensor, present: Tensor) -> Tensor:
    """Logit of the mean over present m of sigmoid(h_m), from (S, B, M, Z) and (B, M) to (S, B, Z); 0 where none is present.

    Of two, logsumexp(h1 + h2, h1 + h2, h1, h2) - logsumexp(0, 0, h1, h2); of one, itself.
    """
    there = present.unsqueeze(-1)
    some = present.any(1, keepdim=True)
    # Where nothing is present all stand in, so that no sum is over nothing; what comes out is not used.
    counted = there | ~some.unsqueeze(-1)
    yes, no = (functional.logsigmoid(side).masked_fill(~counted, -torch.inf).logsumexp(2) for side in (values, -values))
    return torch.where(some, yes - no, 0.0)


class Drfuse(nn.Module):
    """Encoders and core. `reliability` is the mean attention, that of the shared token split evenly (see modality_share)."""

    def __init__(self, config: DrfuseConfig, schema: DataSchema) -> None:
        super().__init__()
        self.link = link_of(schema.label)
        self.encoders: nn.Module
        if config.trunks is None:
            self.encoders = EncodersTwice(config.encoders, schema, config.width)
        else:
            self.encoders = Trunks(config.trunks, schema, config.width)
        self.core = DrfuseCore(len(schema.modalities), config.width, schema.num_outputs, presence_bits=config.presence_bits)

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """Logits of S passes of a normalised batch; keys int64 (S, B).

        parts, rows first: shared and distinct (B, S, M, Z), attention (B, S, K, M + 1), shared_logits (B, S, K).
        """
        present = batch.present
        shared, distinct = self.encoders(batch, keys)
        found: Disentangled = self.core(shared, distinct, present)
        measured = self.link.uncertainties(found.distinct_logits.detach())
        parts = {
            "shared": found.shared,
            "distinct": distinct,
            "attention": found.attention,
            "shared_logits": found.shared_logits,
        }
        return FusionOutput(
            logits=found.logits,
            reliability=modality_share(found.attention.detach(), present),
            uncertainty={name: torch.where(present, value, 0.0) for name, value in measured.items()},
            features=distinct.mean(0),
            modality_logits=found.distinct_logits,
            parts={name: part.transpose(0, 1) for name, part in parts.items()},
            signals=_signals(found, present),
        )


def modality_share(attention: Tensor, present: Tensor) -> Tensor:
    """From attention (S, B, K, M + 1) to weights (B, M): what the shared token gets, the present modalities have in equal parts."""
    mean = attention.mean((0, 2))
    equal = mean[:, -1:] / present.sum(1, keepdim=True).clamp_min(1)
    return torch.where(present, mean[:, :-1] + equal, 0.0)


@torch.no_grad()
def _signals(found: Disentangled, present: Tensor) -> dict[str, Tensor]:
    """Per study, means over passes and labels.

    attention_shared: of the shared token; near 0, nothing shared is used. attention_entropy in nats against
    attention_entropy_most: equal, attention does not choose; 0, it is saturated. shared_saturation: |2 sigmoid(h) - 1| of the
    pooled features; near 1, their sigmoids no longer learn.
    """
    return {
        "attention_shared": found.attention[..., -1].mean((0, 2)),
        "attention_entropy": entropy(found.attention).mean((0, 2)),
        "attention_entropy_most": (present.sum(1) + 1.0).log(),
        "shared_saturation": (2 * found.pooled.sigmoid() - 1).abs().mean((0, 2)),
    }
