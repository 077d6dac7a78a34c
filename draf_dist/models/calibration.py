"""What a model learns from data outside its loss: the scale of U on validation, shares of classes, what clean inputs look like."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from draf_dist.models.cross_modal import CrossModalScore
from draf_dist.models.fusion.draf import Draf
from draf_dist.models.severity import Severity
from draf_dist.schema.batch import Batch

# Where U does not vary at all any alpha gives the same weights; this keeps kappa / s finite.
_LEAST_SCALE = 1e-8


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[tuple[Batch, Tensor]]) -> None:
    """Sets s, the std of U over the present (study, modality) pairs of the validation split, for `alpha_mode: scaled`.

    batches yields normalised batches with evaluation keys (S, B). Models that need no scale leave it unread. With several
    processes each brings its part and all get the same s.
    """
    draf = next(_drafs(model), None)
    if draf is None or draf.config.alpha_mode != "scaled":
        return
    training = model.training
    model.eval()
    device = draf.weights.u_scale.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch, keys in batches:
        counts = batch.present & (batch.weight > 0).unsqueeze(1)
        used = model(batch, keys).uncertainty["used"][counts].double()
        sums += torch.stack([torch.ones_like(used).sum(), used.sum(), used.square().sum()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    draf.weights.u_scale.copy_(_std(sums).clamp_min(_LEAST_SCALE))
    model.train(training)


def set_prevalence(model: nn.Module, held: Tensor, of: Tensor) -> None:
    """Stores the logits of how often each outcome occurs in the training split, for `u_space: prior_shifted`.

    held, of: counts (K,), of how many each outcome held. What never, or always, occurs counts as one study that did otherwise, so
    that its logit stays finite.
    """
    for draf in _drafs(model):
        draf.log_prevalence.copy_(draf.link.prior(held.to(draf.log_prevalence), of.to(draf.log_prevalence)))


def fit_on_clean(
    model: nn.Module, train: Callable[[], Iterable[Batch]], validation: Callable[[], Iterable[Batch]], seed: int
) -> None:
    """Fits the severity and the cross-modal score of a model, which stay as they are from then on.

    train, validation: passes over clean, normalised batches, of which training's are held in memory without their pixels. Models
    that have neither leave them unread. The same batches in the same order give the same numbers: of several processes each reads
    all, and nothing has to be exchanged. Called before training, on the device of the batches.
    """
    for part in model.modules():
        if isinstance(part, Severity):
            part.fit(train(), validation())
        elif isinstance(part, CrossModalScore):
            part.fit(train(), validation(), seed)


def _drafs(model: nn.Module) -> Iterator[Draf]:
    """The model itself, or what lies within another one."""
    return (part for part in model.modules() if isinstance(part, Draf))


def _std(sums: Tensor) -> Tensor:
    count, total, squares = sums
    mean = total / count.clamp_min(1)
    variance: Tensor = squares / count.clamp_min(1) - mean.square()
    return variance.clamp_min(0).sqrt()
