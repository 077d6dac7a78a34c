"""The network of contrastive pre-training: an encoder of images, a projection, a head that says where in the body a crop lies."""

from dataclasses import dataclass

from torch import Tensor, nn

PROJECTED = 128


@dataclass(frozen=True)
class ContrastiveOutput:
    """features f: f32 (B, Z), what fine-tuning gets. embedding g(f): (B, 128). region_logits: (B, R), from f."""

    features: Tensor
    embedding: Tensor
    region_logits: Tensor


class ContrastiveNet(nn.Module):
    """An image encoder f with g = Linear(d, d) - ReLU - Linear(d, 128) and a linear region head (spec 3.1, 3.3).

    The region head reads f: the contrastive loss asks of g alone not to see what differs between views.
    """

    def __init__(self, encoder: nn.Module, width: int, num_regions: int) -> None:
        """encoder: (image, keys) to features (S, B, width)."""
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTED))
        self.region = nn.Linear(width, num_regions)

    def forward(self, image: Tensor, keys: Tensor) -> ContrastiveOutput:
        """One pass of dropout, with keys int64 (B,)."""
        features: Tensor = self.encoder(image, keys[None])[0]
        return ContrastiveOutput(features, self.projection(features), self.region(features))
