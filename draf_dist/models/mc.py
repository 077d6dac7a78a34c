"""Monte-Carlo dropout that is really on: masks are a pure function of the sample's key, whatever the module's mode.

Activations carry two leading axes, (S, B, ...) with S = 1 until the first dropout: what comes before it is the same in every
pass, is computed once, and is repeated by broadcasting.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.errors import SpecError, explain
from draf_dist.schema.batch import ModalityInput


class MCDropout(nn.Module):
    """Zeroes an element with probability p and multiplies the rest by 1 / (1 - p), in training and in evaluation alike.

    There is no flag to switch it off (rule D5): `eval()` changes nothing. A mask depends on the key of (pass, study), on the
    module's own stream and on the element, so a study meets the same masks in any batch and on any rank. With `channels` one
    draw drops a whole channel of a map (S, B, C, H, W).
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
        shape = tuple(values.shape[2:3] if self.channels else values.shape[2:])
        dropped = noise.bernoulli(noise.chain(keys, self.stream), shape, self.probability)
        scale = (~dropped).to(values.dtype) * (1 / (1 - self.probability))
        return values * scale.view(*scale.shape, *[1] * (values.dim() - scale.dim()))

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"p={self.probability}, channels={self.channels}"


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
