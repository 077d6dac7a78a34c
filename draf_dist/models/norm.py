"""Batch normalisation over the weighted global batch, and its stand-in that looks at one row alone.

torch's own cannot serve: nn.BatchNorm counts absent and padding rows and sees one rank, SyncBatchNorm refuses the CPU, and neither
knows weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draf_dist.models.over_ranks import sum_over_ranks

# As many do as well as 32 groups (Wu and He 2018); with a few, a map of one element is normalised to next to nothing.
_LEAST_PER_GROUP = 16


class BatchNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias per channel (Ioffe and Szegedy 2015), over the rows of all ranks.

    In training mean and var are those of the global batch: of a step without accumulation all of it, with accumulation the
    micro-batches of all ranks that are computed together. mean = sum w x / sum w and var = sum w (x - mean)^2 / sum w over rows
    and positions, with w the weight of the row; rows of weight 0 have no part in them, whatever they hold. Weights that are
    all equal give nn.BatchNorm1d, 2d or 3d. In evaluation they are the running ones, and no row depends on another.

    running_var takes n / (n - 1) var, as torch does, with n = (sum w)^2 / sum w^2 values (Kish): free of the scale of w. Where
    n <= 1 there is no variance to learn from and both stay.

    Every rank calls it equally often, with as many rows as it has, also none. The gradient goes through the statistics of all
    ranks: summed over ranks it is that of one process. Parameters: weight, bias (C,). Buffers: running_mean, running_var (C,).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        """momentum: share of a batch in the running statistics (what Keras calls momentum is 1 minus this)."""
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, values: Tensor, weight: Tensor) -> Tensor:
        """Values (N, C, ...) and weights (N,), at least 0, to the same shape in f32, or f64 if the values are.

        In training, rows of weight 0 come out as rows of zeros would.
        """
        flat = values.to(torch.promote_types(values.dtype, torch.float32)).flatten(2) if values.dim() > 2 else values.unsqueeze(2)
        if self.training:
            flat = torch.where(weight.view(-1, 1, 1) > 0, flat, 0.0)
            moments = global_moments(flat, weight)
            self._move(moments)
            normalised = self._normalise(flat, moments.mean, moments.var)
        else:
            normalised = self._normalise(flat, self.running_mean, self.running_var)
        return normalised.view(values.shape)

    def _normalise(self, flat: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        scale = (var + self.eps).rsqrt().to(flat.dtype) * self.weight
        return (flat - mean.to(flat.dtype).unsqueeze(1)) * scale.unsqueeze(1) + self.bias.unsqueeze(1)

    @torch.no_grad()
    def _move(self, moments: "Moments") -> None:
        count = moments.count
        rate = self.momentum * (count > 1).to(self.running_mean.dtype)
        unbiased = moments.var * (count / (count - 1).clamp_min(torch.finfo(count.dtype).tiny))
        self.running_mean.lerp_(moments.mean.to(rate.dtype), rate)
        self.running_var.lerp_(torch.where(count > 1, unbiased, 0.0).to(rate.dtype), rate)

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"{self.weight.shape[0]}, momentum={self.momentum}, eps={self.eps}"


class RowNorm(nn.Module):
    """GroupNorm where a model would otherwise have BatchNorm: every row by itself, in training and in evaluation alike.

    At most 8 groups, of at least 16 channels where there are so many.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        most = max(1, min(8, channels // _LEAST_PER_GROUP))
        groups = next(number for number in range(most, 0, -1) if channels % number == 0)
        self.group = nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, values: Tensor, weight: Tensor) -> Tensor:
        """Values (N, C, ...) to the same shape; the weight of a row has no part in it."""
        normalised: Tensor = self.group(values)
        return normalised


@dataclass(frozen=True)
class Moments:
    """Of the global batch, f64: mean and var (C,), which divides by the sum of weights; count (), how many values they are of."""

    mean: Tensor
    var: Tensor
    count: Tensor


def global_moments(values: Tensor, weight: Tensor) -> Moments:
    """The weighted moments per channel of values (N, C, P) under weights (N,), over the rows of all ranks. A collective."""
    channels, positions = values.shape[1:]
    each = weight.to(torch.float64)
    counts = torch.stack([each.sum(), each.square().sum()]) * positions
    sums = sum_over_ranks(torch.cat([*_power_sums(values, weight, counts[0]), counts]))
    total, squares = sums[-2:].detach()
    # Nothing counted anywhere: then all sums are 0, and so are the moments.
    divisor = torch.where(total > 0, total, 1.0)
    mean, mean_square = sums[: 2 * channels].view(2, channels) / divisor
    count = total.square() / torch.where(squares > 0, squares, 1.0)
    return Moments(mean, (mean_square - mean.square()).clamp_min(0), count)


def _power_sums(values: Tensor, weight: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Sum w x and sum w x^2, each f64 (C,), of the local rows.

    Taken around the local mean: of values far from 0, f32 squares would have lost what the variance is made of.
    """
    weights = weight.view(-1, 1, 1).to(values.dtype)
    shift = (values.detach() * weights).sum((0, 2)) / torch.where(total > 0, total, 1.0).to(values.dtype)
    centred = values - shift.unsqueeze(1)
    weighted = centred * weights
    first, second = weighted.sum((0, 2)).double(), (weighted * centred).sum((0, 2)).double()
    around = shift.double()
    return first + total * around, second + 2 * around * first + total * around.square()
