"""How well an order mixes, against a full shuffle."""

import numpy as np

from draf_dist.data.order import Order
from draf_dist.data.permutation import IntArray

# A variance measured on n batches of two categories scatters by sqrt(2 / n): a tenth with 200.
MAX_BATCHES = 200
MAX_EPOCHS = 20


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
    num_samples = order.num_samples
    full_batches = num_samples // order.batch_size
    _, index = np.unique(category, return_inverse=True)
    counts = np.bincount(index)
    if len(category) != num_samples or len(counts) < 2 or full_batches < 2:
        raise ValueError(f"expected {num_samples} categories of two kinds or more, and two full batches")
    first = epoch * order.steps_per_epoch
    batches = np.stack([index[order.draws(first + batch).sample] for batch in range(full_batches)])
    return variance_ratio(batches, counts, num_samples)


def variance_ratio(batches: IntArray, counts: IntArray, num_samples: int) -> float:
    """The same of some full batches.

    batches: (n, B), the category of every entry, 0 .. K-1. counts: (K,), of each in the whole, or in a part that stands for it.
    num_samples: N, more than B.
    """
    batch_size = batches.shape[1]
    share = np.stack([np.bincount(batch, minlength=len(counts)) for batch in batches]) / batch_size
    whole = counts / counts.sum()
    # Around the known mean of the epoch, not that of the batches.
    measured = np.mean((share - whole) ** 2, axis=0).sum()
    expected = (whole * (1 - whole)).sum() * (num_samples - batch_size) / (batch_size * (num_samples - 1))
    return float(measured / expected)


def steps_to_measure(order: Order, max_batches: int = MAX_BATCHES) -> list[int]:
    """Steps of full batches, evenly spread: over one epoch, or over more where it has fewer batches than are wanted."""
    full = order.num_samples // order.batch_size
    if full == 0:
        return []
    epochs = min(MAX_EPOCHS, -(-max_batches // full))
    number = min(max_batches, epochs * full)
    # The middle of each of so many equal parts.
    chosen = (2 * np.arange(number) + 1) * epochs * full // (2 * number)
    return [int(epoch * order.steps_per_epoch + batch) for epoch, batch in zip(*np.divmod(chosen, full), strict=True)]
