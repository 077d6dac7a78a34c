"""Images made to mislead: FGSM and PGD against a network that draws (BSSL proposal 2.2.3; spec 3.5).

From the proposal: both attacks, alpha, examples weighted by their epistemic uncertainty. By spec 3.5: the valid range, expectation
over transformation (Athalye et al. 2018), the form of the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from draf_dist import noise
from draf_dist.config.spec import Spec

# From images (B, C, *space) to what each loses, (B,). No row may look at another.
RowLoss = Callable[[Tensor], Tensor]
# A sum over ranks.
Reduce = Callable[[Tensor], Tensor]


class AdversarialConfig(Spec):
    """L_adv = a L(x) + (1 - a) w_i L(x_adv), a = clean_weight (proposal 2.2.3; w_i by spec 3.5).

    epsilon: share of the image's own range; step_size: share of epsilon a step of PGD goes; samples: K draws of the weights behind
    every gradient. L_total has L(x) already, so with include_clean its weight becomes 1 + lambda_adv a, as the proposal writes it;
    without, L_adv is its second part alone.
    """

    attack: Literal["fgsm", "pgd"] = "pgd"
    epsilon: float = Field(4 / 255, gt=0, le=1)
    steps: int = Field(7, ge=1)
    step_size: float = Field(0.25, gt=0, le=1)
    samples: int = Field(3, ge=1)
    clean_weight: float = Field(0.5, ge=0, lt=1)
    include_clean: bool = True

    def craft(self, loss: RowLoss, image: Tensor, keys: Tensor) -> Tensor:
        """The attacked images; keys int64 (B,) of the random start of PGD."""
        box = valid_box(image, self.epsilon)
        if self.attack == "fgsm":
            return fgsm(loss, box)
        return pgd(loss, box, keys, steps=self.steps, step_size=self.step_size)


@dataclass(frozen=True)
class Box:
    """Where an attacked image may lie: within `radius` of the clean one, and within [low, high].

    clean: f32 (B, C, *space). radius, low, high: f32 (B, 1, ...).
    """

    clean: Tensor
    radius: Tensor
    low: Tensor
    high: Tensor

    def project(self, image: Tensor) -> Tensor:
        """The nearest image in the box."""
        near = torch.clamp(image, self.clean - self.radius, self.clean + self.radius)
        return torch.clamp(near, self.low, self.high)


def valid_box(image: Tensor, epsilon: float) -> Box:
    """The box of a normalised image: its range is from its own least to its own largest value, epsilon a share of that."""
    flat = image.detach().flatten(1)
    low, high = (bound.view(-1, *[1] * (image.dim() - 1)) for bound in (flat.amin(1), flat.amax(1)))
    return Box(image.detach(), epsilon * (high - low), low, high)


def fgsm(loss: RowLoss, box: Box) -> Tensor:
    """X + epsilon sign(grad_x L) (Goodfellow et al. 2015), in the box."""
    return box.project(box.clean + box.radius * gradient_sign(loss, box.clean))


def pgd(loss: RowLoss, box: Box, keys: Tensor, *, steps: int, step_size: float) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018) from a random place of the box, `steps` times step_size epsilon sign(grad_x L).

    keys: int64 (B,), of the start.
    """
    start = 2 * noise.uniform(noise.chain(keys, "pgd"), tuple(box.clean.shape[1:])).to(box.clean.dtype) - 1
    image = box.project(box.clean + box.radius * start)
    for _ in range(steps):
        image = box.project(image + step_size * box.radius * gradient_sign(loss, image))
    return image


def gradient_sign(loss: RowLoss, image: Tensor) -> Tensor:
    """The sign of d loss_i / d image_i for every row; the gradients of parameters stay as they are."""
    # Also where a step is only looked at, without gradients of its own.
    with torch.enable_grad():
        leaf = image.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return gradient.sign()


def uncertainty_weights(uncertainty: Tensor, weight: Tensor, reduce: Reduce) -> Tensor:
    """w_i = U_i / mean U in [.5, 2], without gradient (spec 3.5); uncertainty and weight (B,), the mean over the rows of all ranks.

    1 where nothing is uncertain.
    """
    measured = uncertainty.detach()
    total, count = reduce(torch.stack([(weight * measured).sum(), weight.sum()])).to(measured.dtype)
    mean = total / count.clamp_min(1e-12)
    return torch.where(mean > 0, measured / mean.clamp_min(1e-30), 1.0).clamp(0.5, 2.0)
