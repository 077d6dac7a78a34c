"""HEALNet: a latent array that reads the raw modalities one after the other (arXiv 2311.09115v3, NeurIPS 2024; spec 4.5).

The paper's: everything in models/latent_attention.py but what stands there as ours. Ours: MC dropout, patches of large images,
presence bits, equal weights: the method has no weight of a modality, only attention within one, so `reliability` says 1 / n.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from draf_dist.models.absent import clear_absent
from draf_dist.models.backbones import module_name
from draf_dist.models.latent_attention import FourierCode, LatentAttention, LatentAttentionConfig, Latents
from draf_dist.models.layers import PresenceBits
from draf_dist.models.mc import name_streams
from draf_dist.models.raw_tokens import tokens_of
from draf_dist.models.reliability import equal_weights
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.modality import DataSchema

# Rows times passes that go together on a CPU where no gradient is wanted: a feed-forward step is 8 widths wide.
_ROWS_AT_ONCE = 64


class HealnetConfig(LatentAttentionConfig):
    """Sizes, and how modalities become tokens; the defaults of both are the paper's where it has them.

    bands, max_freq: of the Fourier code of positions. An image of more than max_tokens pixels is read in the smallest patches of
    which it needs no more, each as patch_width values.
    """

    kind: Literal["healnet"] = "healnet"
    bands: int = Field(2, ge=1)
    max_freq: float = Field(10.0, ge=2)
    max_tokens: int = Field(1728, ge=1)
    patch_width: int = Field(64, ge=1)
    presence_bits: bool = False

    def build(self, schema: DataSchema) -> "Healnet":
        """The model for one data schema."""
        model = Healnet(self, schema)
        name_streams(model)
        return model


class Healnet(nn.Module):
    """Logits of the mean latent, once every present modality has been read `depth` times."""

    def __init__(self, config: HealnetConfig, schema: DataSchema) -> None:
        super().__init__()
        self.names = schema.names
        code = FourierCode(config.bands, config.max_freq)
        sizes = {"max_tokens": config.max_tokens, "patch_width": config.patch_width}
        readers = [tokens_of(spec, code=code, **sizes) for spec in schema.modalities]
        self.readers = nn.ModuleDict({module_name(name): reader for name, reader in zip(self.names, readers, strict=True)})
        self.attention = LatentAttention([reader.spec for reader in readers], schema.num_outputs, config)
        self.bits = PresenceBits(len(self.names), config.width) if config.presence_bits else None

    def forward(self, batch: Batch, keys: Tensor) -> FusionOutput:
        """Logits of S passes of a normalised batch; keys int64 (S, B). Without features: no modality stands alone."""
        present = batch.present
        latents = self.read(batch, keys)
        pooled = torch.cat([part.state.mean(2) for part in latents])
        if self.bits is not None:
            pooled = pooled + self.bits(present)
        return FusionOutput(
            logits=self.attention.classify(pooled),
            reliability=equal_weights(present),
            uncertainty={},
            features=pooled.new_zeros(*present.shape, 0),
            signals=_signals(latents[0], present),
        )

    def read(self, batch: Batch, keys: Tensor) -> list[Latents]:
        """The latents of all passes, in parts that go together."""
        inputs = clear_absent(batch)
        tokens = [self.readers[module_name(name)](inputs[name]) for name in self.names]
        return [self.attention(tokens, batch.present, part) for part in _in_parts(keys)]


def _signals(latents: Latents, present: Tensor) -> dict[str, Tensor]:
    """Means over the present modalities, in the first pass.

    latent_change: |step| / |latents|; near 0, a modality is read and changes nothing. attention_entropy against
    attention_entropy_most, in nats: equal, attention looks everywhere alike; 0, at one token alone.
    """
    shares = equal_weights(present)
    named = {"latent_change": latents.change, "attention_entropy": latents.entropy, "attention_entropy_most": latents.most}
    return {name: (shares * values).sum(1) for name, values in named.items()}


def _in_parts(keys: Tensor) -> tuple[Tensor, ...]:
    """Passes that go together: all of them where a gradient is wanted or a GPU computes."""
    if torch.is_grad_enabled() or not keys.is_cpu:
        return (keys,)
    return torch.split(keys, max(1, _ROWS_AT_ONCE // max(1, keys.shape[1])))
