"""Memory of batches, used again once nobody refers to it any more.

A batch of images is tens of megabytes. Were each made anew, the kernel would have to hand out and clear its pages every time. So
arrays come back here when the last tensor that shares them is gone.
"""

import weakref
from collections import defaultdict, deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Key = tuple[tuple[int, ...], str]
# Of one shape: more batches than a loader has under way are not kept.
KEPT = 16


class Arena:
    """Hands out arrays of unknown content. pinned: in page-locked memory, which a GPU can copy from while it computes."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        # Appending to and taking from a deque is atomic: a lock could be asked for by the garbage collector while it is held.
        self._free: dict[_Key, deque[NDArray[Any]]] = defaultdict(lambda: deque(maxlen=KEPT))

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[NDArray[Any], Tensor]:
        """An array and the tensor of the same memory. Both may be kept for as long as one likes."""
        if self._pinned:
            # torch has an arena of its own for such memory, which also waits for copies that are under way.
            tensor = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
            return tensor.numpy(), tensor
        key = (shape, dtype.str)
        try:
            memory = self._free[key].pop()
        except IndexError:
            memory = np.empty(shape, dtype)
        array = memory.view()
        # The tensor, and all that is cut from it, holds this view: with it the last user is gone.
        weakref.finalize(array, self._free[key].append, memory).atexit = False
        return array, torch.from_numpy(array)
