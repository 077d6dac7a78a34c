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
    # use_deterministic_algorithms does the same, but imports torch's compiler for it: a second at every start.
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "warn")
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.set_deterministic_debug_mode(mode)
