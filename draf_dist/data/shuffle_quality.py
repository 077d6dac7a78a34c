"""How well an order mixes, against a full shuffle."""

import numpy as np

from draf_dist.data.order import Order
from draf_dist.data.permutation import IntArray


def shuffle_quality(order: Order, category: IntArray, *, epoch: int = 0) -> float:
    """Variance of the full batches' shares of each category over that of a full shuffle; 1 is perfect, more is worse.

    sum_k Var_b(s_bk) / sum_k p_k (1 - p_k) (N - B) / (B (N - 1)), s_bk the share of category k in batch b of one epoch and p_k
    that of the whole: the denominator is what B samples drawn without replacement from N have.

    Args:
        order: whose epoch is measured; it needs at least two full batches.
        category: int64 (N,), the site or the label of every sample, in manifest order.
        epoch: which one.

    Raises:
        ValueError: category is not (N,), has but one value, or there are fewer than two full batches.
    """
    num_samples, batch_size = order.num_samples, order.batch_size
    full_batches = num_samples // batch_size
    _, index = np.unique(category, return_inverse=True)
    counts = np.bincount(index)
    if len(category) != num_samples or len(counts) < 2 or full_batches < 2:
        raise ValueError(f"expected {num_samples} categories of two kinds or more, and two full batches")
    first = epoch * order.steps_per_epoch
    batches = [np.bincount(index[order.draws(first + batch).sample], minlength=len(counts)) for batch in range(full_batches)]
    share, whole = np.array(batches) / batch_size, counts / num_samples
    # Around the known mean of the epoch, not that of the full batches.
    measured = np.mean((share - whole) ** 2, axis=0).sum()
    expected = (whole * (1 - whole)).sum() * (num_samples - batch_size) / (batch_size * (num_samples - 1))
    return float(measured / expected)
