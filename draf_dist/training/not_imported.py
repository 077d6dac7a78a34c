"""Libraries that import others which nobody needs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_imported(name: str) -> Iterator[None]:
    """While entered, to import a module fails as if it were not installed; nothing changes where it has been imported already."""
    if name in sys.modules:
        yield
        return
    # What Python itself takes for a module that is known not to be there.
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
