"""A process that ends in the middle of a write."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from draf_dist.storage import LocalStore


class Died(BaseException):
    """Stands for the end of the process: nothing that the code itself may catch."""


@contextmanager
def dying_after(num_writes: int) -> Iterator[None]:
    """Inside the block that many writes to local stores are carried out; at the next one its writer dies."""
    publish, num_left = LocalStore._publish, num_writes

    def dying(store: LocalStore, temporary: Path, path: str) -> None:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise Died
        publish(store, temporary, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "_publish", dying)
        yield
