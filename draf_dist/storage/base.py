"""What every store can do: whole objects and byte ranges in, atomic writes and compare-and-swap out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Self

from draf_dist.errors import SpecError, explain
from draf_dist.storage.traffic import Traffic


class MissingError(SpecError):
    """A path in a store that was asked for and is not there."""


class Store(ABC):
    """A folder on a disk or a prefix in a bucket; paths inside it are relative, with "/" between their parts.

    Every method may be called from several threads at once. A reader sees an object whole or not at all. What goes wrong is
    raised as: MissingError (nothing at that path), StorageFullError (no room), UnreachableError (no answer, or refused).

    Attributes:
        url: Where it is.
        traffic: What was asked of it in this process.
    """

    url: str
    traffic: Traffic

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop); shorter, or none, where the object ends before stop."""

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | memoryview]:
        """One answer for every [start, stop) asked for, in order. What is near one another is the caller's to join."""
        return [self.read_range(path, start, stop) for start, stop in ranges]

    @abstractmethod
    def read_with_etag(self, path: str) -> tuple[bytes, str]:
        """The whole object and the tag that names exactly this content to `swap`."""

    @abstractmethod
    def write(self, path: str, data: bytes | memoryview) -> None:
        """Writes the object, or replaces it, at once. Of a memoryview no copy is made; it must not change meanwhile."""

    @abstractmethod
    def upload(self, path: str, local: Path) -> None:
        """Writes the content of a local file, at once."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Writes the object unless there is one already; says whether it did. Of several racing callers one gets True."""

    @abstractmethod
    def swap(self, path: str, data: bytes, etag: str) -> bool:
        """Replaces the object if its content still has this tag; says whether it did. Of several racing callers one gets True."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Size in bytes, None where there is no such object."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Paths of all objects below the folder `prefix`, sorted; files that are still being written are left out."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Removes the object; does nothing where there is none."""

    @abstractmethod
    def local_path(self, path: str) -> Path | None:
        """Where the object lies on this machine (for memory mapping), None for a remote store."""

    def apart(self) -> Self:
        """The same store, its connections too, with a traffic of its own: what is asked through it is counted there alone."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.traffic = Traffic()
        return other

    def exists(self, path: str) -> bool:
        """Whether there is an object at the path."""
        return self.size(path) is not None

    def where(self, path: str) -> str:
        """The URL of an object, for messages."""
        return f"{self.url}/{path}" if path else self.url

    def missing(self, path: str) -> MissingError:
        """The error for a path that is not there."""
        return MissingError(
            explain(self.where(path), expected="a file", found="nothing", remedy="Check the URL, or write it first.")
        )


def checked(path: str) -> str:
    """The path, if it stays inside its store.

    Raises:
        SpecError: it is absolute or climbs out with "..".
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        remedy = "Use a relative path."
        raise SpecError(explain(path, expected="a path inside the store", found="one that leaves it", remedy=remedy))
    return path
