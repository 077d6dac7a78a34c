"""The network of contrastive pre-training: an encoder of images, a projection, and heads for where and how an image was taken."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROJECTED = 128


@dataclass(frozen=True)
class ContrastiveOutput:
    """What the terms are made of. f: what fine-tuning gets, f32 (B, Z); g: its projection, f32 (B, 128).

    region_logits: (B, R), from f. protocol_logits: (B, P), from f, with a gradient to it. probe_f, probe_g: (B, P), from f and
    from g with no gradient to either.
    """

    features: Tensor
    embedding: Tensor
    region_logits: Tensor
    protocol_logits: Tensor
    probe_f: Tensor
    probe_g: Tensor


class ContrastiveNet(nn.Module):
    """An image encoder f with g = Linear(d, d) - ReLU - Linear(d, 128), and linear heads for region and protocol (spec 3.1, 3.3).

    The heads read f: the contrastive loss asks of g alone not to see what differs between views. What f and g know of the
    protocol is measured by two linear probes that train nothing but themselves, so that the two are compared on equal terms.
    """

    def __init__(
        self, encoder: nn.Module, width: int, num_regions: int, num_protocols: int, *, protocol_adversarial: bool = False
    ) -> None:
        """encoder: (image, keys) to features (S, B, width). protocol_adversarial: the protocol head makes f forget it."""
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTED))
        self.region = nn.Linear(width, num_regions)
        self.protocol = nn.Linear(width, num_protocols)
        self.probe_f = nn.Linear(width, num_protocols)
        self.probe_g = nn.Linear(PROJECTED, num_protocols)
        self.protocol_gradient = -1.0 if protocol_adversarial else 1.0

    def forward(self, image: Tensor, keys: Tensor) -> ContrastiveOutput:
        """One pass of dropout, with keys int64 (B,)."""
        features: Tensor = self.encoder(image, keys[None])[0]
        embedding: Tensor = self.projection(features)
        return ContrastiveOutput(
            features=features,
            embedding=embedding,
            region_logits=self.region(features),
            protocol_logits=self.protocol(scale_gradient(features, self.protocol_gradient)),
            probe_f=self.probe_f(features.detach()),
            probe_g=self.probe_g(embedding.detach()),
        )


def scale_gradient(values: Tensor, factor: float) -> Tensor:
    """The values themselves, with a gradient times the factor; at -1 gradient reversal (Ganin et al. 2016)."""
    scaled: Tensor = _ScaledGradient.apply(values, factor)  # type: ignore[no-untyped-call]
    return scaled


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None
