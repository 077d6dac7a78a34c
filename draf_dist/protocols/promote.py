"""The history of a registered model: entries 000000, 000001, ... that are made once and never changed. It decides who is champion.

What may follow depends on all that came before, so it is decided anew whenever another entry came first. An alias for other tools
follows the history; who dies before it does leaves it to the next.
"""

from collections.abc import Callable, Sequence

from draf_dist.protocols.operations import Create, List, Read, Size, Steps, Write


def append(history: str, entry_after: Callable[[Sequence[bytes]], bytes | None]) -> Steps[bytes | None]:
    """Appends one entry; returns it, None where there was nothing to do.

    history: the folder. entry_after: the entry to follow those that it is given, oldest first; None: it is not needed; it raises
    what forbids it. Unless something else keeps others from appending meanwhile, the entry holds what no other call's does.
    """
    while True:
        entries = yield from read_history(history)
        entry = entry_after(entries)
        if entry is None:
            return None
        path = entry_path(history, len(entries))
        if (yield Create(path, entry)) or (yield Read(path)) == entry:
            return entry


def follow(history: str, alias: str, alias_after: Callable[[Sequence[bytes]], bytes]) -> Steps[None]:
    """Writes the alias that the history asks for, until no entry has come meanwhile."""
    while True:
        entries = yield from read_history(history)
        yield Write(alias, alias_after(entries))
        if (yield Size(entry_path(history, len(entries)))) is None:
            return


def read_history(history: str) -> Steps[list[bytes]]:
    """Every entry, oldest first."""
    paths: list[str] = yield List(history)
    entries = []
    for path in paths:
        entries.append((yield Read(path)))
    return entries


def entry_path(history: str, number: int) -> str:
    """Where an entry lies; number: from 0."""
    return f"{history}/{number:06d}"
