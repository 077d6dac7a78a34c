"""Libraries that import others which nobody needs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


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


@contextmanager
def not_compiled() -> Iterator[None]:
    """While entered, torch.compile hands functions back as they are: then a module that calls it does not import torch's compiler.

    That takes seconds of every start, and nothing here is compiled.
    """
    compiled = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiled


def _as_it_is(function: Callable[..., Any] | None = None, **_: object) -> Any:
    return function if function is not None else _as_it_is
