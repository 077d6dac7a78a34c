"""Monte-Carlo dropout that is really on: masks are a pure function of the sample's key, whatever the module's mode.

Activations carry two leading axes, (S, B, ...) with S = 1 until the first dropout: what comes before it is the same in every
pass, is computed once, and is repeated by broadcasting.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.errors import SpecError, explain
from draf_dist.schema.batch import ModalityInput

# What the passes draw anew: `full`, every dropout; `head`, only those of the last stage, the projections (spec 1.2).
Scope = Literal["full", "head"]
# What SELU tends to for very negative inputs, -lambda alpha (Klambauer et al. 2017, eq. 2 and 14).
SELU_FLOOR = -1.0507009873554805 * 1.6732632423543772


class MCDropout(nn.Module):
    """Zeroes an element with probability p and multiplies the rest by 1 / (1 - p), in training and in evaluation alike.

    There is no flag to switch it off (rule D5): `eval()` changes nothing. A mask depends on the key of (pass, study), on the
    module's own stream and on the element, so a study meets the same masks in any batch and on any rank. With `channels` one
    draw drops a whole channel of a map (S, B, C, H, W) or (S, B, C, D, H, W).
    """

    def __init__(self, probability: float, *, channels: bool = False) -> None:
        super().__init__()
        self.probability = probability
        self.channels = channels
        self.stream = 0

    def forward(self, values: Tensor, keys: Tensor) -> Tensor:
        """Values (S or 1, B, ...) and int64 keys (S, B) to (S, B, ...)."""
        if self.probability == 0:
            return values
        scale = (~self.dropped(values, keys)).to(values.dtype) * (1 / (1 - self.probability))
        return values * scale

    def dropped(self, values: Tensor, keys: Tensor) -> Tensor:
        """What is dropped: bool (S, B, ...), with axes of length 1 where one draw stands for all."""
        shape = tuple(values.shape[2:3] if self.channels else values.shape[2:])
        mask = noise.bernoulli(noise.chain(keys, self.stream), shape, self.probability)
        return mask.view(*mask.shape, *[1] * (values.dim() - mask.dim()))

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"p={self.probability}, channels={self.channels}"


class MCAlphaDropout(MCDropout):
    """Alpha dropout for SELU networks: a dropped element becomes SELU's floor, and what is left is scaled and shifted.

    y = a (x if kept else f) + b with f = -lambda alpha, q = 1 - p, a = (q + f^2 q p)^(-1/2), b = -a p f   (Klambauer et al. 2017,
    section "New dropout technique"). Inputs of mean 0 and variance 1 keep both.
    """

    def forward(self, values: Tensor, keys: Tensor) -> Tensor:
        """Values (S or 1, B, ...) and int64 keys (S, B) to (S, B, ...)."""
        if self.probability == 0:
            return values
        kept = 1 - self.probability
        scale = 1 / math.sqrt(kept + SELU_FLOOR**2 * kept * self.probability)
        shift = -scale * self.probability * SELU_FLOOR
        return torch.where(self.dropped(values, keys), scale * SELU_FLOOR + shift, scale * values + shift)


def name_streams(model: nn.Module) -> None:
    """Gives every MCDropout a stream of its own, from its qualified name: stable over runs, machines and wrappers."""
    for name, module in model.named_modules():
        if isinstance(module, MCDropout):
            module.stream = noise.chain("mc_dropout", name)


def per_pass(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Applies a function of (N, ...) to values (S, B, ...) with N = S * B."""
    flat = function(values.flatten(0, 1))
    return flat.view(*values.shape[:2], *flat.shape[1:])


def has_dropout(module: nn.Module) -> bool:
    """Whether any part of it draws masks."""
    return any(isinstance(part, MCDropout) and part.probability > 0 for part in module.modules())


def check_sampling(encoders: Iterable[tuple[str, nn.Module]], probes: dict[str, ModalityInput]) -> None:
    """The start-up guard of rule D5: in evaluation mode two passes of every encoder with dropout differ.

    probes holds one input per modality, of any number of rows. On the meta device there is nothing to compare.

    Raises:
        SpecError: an encoder that claims to sample gives the same features in both passes.
    """
    for name, encoder in encoders:
        if not has_dropout(encoder) or any(parameter.is_meta for parameter in encoder.parameters()):
            continue
        if not _passes_differ(encoder, probes[name]):
            raise SpecError(
                explain(
                    f"encoder of {name}",
                    expected="Monte-Carlo passes that differ",
                    found="the same features in both",
                    remedy="Use a larger dropout.",
                )
            )


@torch.no_grad()
def _passes_differ(encoder: nn.Module, probe: ModalityInput) -> bool:
    values = probe if isinstance(probe, Tensor) else probe.values
    rows = torch.arange(values.shape[0], device=values.device)
    keys = torch.stack([noise.hash64(1, rows), noise.hash64(2, rows)])
    training = encoder.training
    features = encoder.eval()(probe, keys)
    encoder.train(training)
    return not torch.equal(features[0], features[1])
