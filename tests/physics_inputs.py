"""What the tests of scanners' physics are fed: keys, and intensities that are not negative."""

import torch
from torch import Tensor

from draf_dist import noise


def keys_of(count: int) -> Tensor:
    """Int64 (count,), always the same."""
    return noise.sample_keys(11, "physics", None, torch.arange(count), 1)[0]


def magnitudes(*shape: int) -> Tensor:
    """Uniform in [0, 1)."""
    return noise.uniform(keys_of(shape[0]), shape[1:])
