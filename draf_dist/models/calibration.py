"""What a model learns from data outside its loss: the scale of U on validation, the shares of the classes in training."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from draf_dist.models.fusion.draf import Draf
from draf_dist.schema.batch import Batch

# Where U does not vary at all any alpha gives the same weights; this keeps kappa / s finite.
_LEAST_SCALE = 1e-8


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[tuple[Batch, Tensor]]) -> None:
    """Sets s, the std of U over the present (study, modality) pairs of the validation split, for `alpha_mode: scaled`.

    batches yields normalised batches with evaluation keys (S, B). Models that need no scale leave it unread. With several
    processes each brings its part and all get the same s.
    """
    if not isinstance(model, Draf) or model.config.alpha_mode != "scaled":
        return
    training = model.training
    model.eval()
    device = model.weights.u_scale.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch, keys in batches:
        counts = batch.present & (batch.weight > 0).unsqueeze(1)
        used = model(batch, keys).uncertainty["used"][counts].double()
        sums += torch.stack([torch.ones_like(used).sum(), used.sum(), used.square().sum()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    model.weights.u_scale.copy_(_std(sums).clamp_min(_LEAST_SCALE))
    model.train(training)


def set_prevalence(model: nn.Module, class_counts: Tensor) -> None:
    """Stores log(share of each class) from counts (K,) in the training split, for `u_space: prior_shifted`.

    A class that never occurs counts as one study, so that its log stays finite.
    """
    if isinstance(model, Draf):
        counts = class_counts.to(model.log_prevalence).clamp_min(1)
        model.log_prevalence.copy_((counts / counts.sum()).log())


def _std(sums: Tensor) -> Tensor:
    count, total, squares = sums
    mean = total / count.clamp_min(1)
    variance: Tensor = squares / count.clamp_min(1) - mean.square()
    return variance.clamp_min(0).sqrt()
