"""What makes the same run give the same bits: operators without races, and a fixed number of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable(threads: int, device: torch.device) -> Iterator[None]:
    """Sets both while entered and puts back what was there.

    Sums over threads depend on how many there are. On the CPU every operator in use has a deterministic form; on a GPU those that
    have none give a warning instead of an error.
    """
    num_threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.set_deterministic_debug_mode(mode)
