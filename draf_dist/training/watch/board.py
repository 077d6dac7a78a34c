"""Where ranks tell one another how they are without a collective: the key-value store that their process group was made with."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from torch._C._distributed_c10d import Store as KeyValueStore
from torch.distributed import distributed_c10d as c10d

ANSWER_S = 5.0


class Board(Protocol):
    """Short texts by key, seen by every rank. Nothing here waits for another rank."""

    def put(self, key: str, text: str) -> None:
        """Writes a text, or replaces it."""
        ...

    def get(self, key: str) -> str | None:
        """The text at a key; None where there is none, or the board does not answer."""
        ...


class OwnBoard:
    """Of one process."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def put(self, key: str, text: str) -> None:
        """See Board."""
        self._texts[key] = text

    def get(self, key: str) -> str | None:
        """See Board."""
        return self._texts.get(key)


@dataclass
class GroupBoard:
    """Of the default process group, through a connection of its own: the group's may be waiting.

    Once it has failed it is not asked again: who kept it is gone, and torch would print a page about that every time.
    """

    store: KeyValueStore
    gone: bool = False

    @classmethod
    def open(cls, name: str) -> "GroupBoard":
        """name: of this attempt; what an earlier one left there is not seen."""
        clone = c10d._get_default_store().clone()  # type: ignore[attr-defined]
        clone.set_timeout(timedelta(seconds=ANSWER_S))
        return cls(c10d.PrefixStore(f"draf-watch/{name}", clone))

    def put(self, key: str, text: str) -> None:
        """See Board."""
        try:
            if not self.gone:
                self.store.set(key, text)
        except RuntimeError:
            # The collectives will say so.
            self.gone = True

    def get(self, key: str) -> str | None:
        """See Board."""
        try:
            return self.store.get(key).decode() if not self.gone and self.store.check([key]) else None
        except RuntimeError:
            self.gone = True
            return None
