"""A folder that is read by ranges, as a remote store is, and counts what is asked for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from draf_dist.data.release import Release
from draf_dist.storage import LocalStore


class RemoteFolder(LocalStore):
    """asked: (path, start, stop) of every range, in the order in which they came."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[tuple[str, int, int]] = []

    def local_path(self, path: str) -> Path | None:
        return None

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self.asked += [(path, start, stop) for start, stop in ranges]
        return [self.read_range(path, start, stop) for start, stop in ranges]

    @property
    def num_bytes(self) -> int:
        return sum(stop - start for _, start, stop in self.asked)


def as_remote(release: Release) -> tuple[Release, RemoteFolder]:
    """The release as if its folder were a bucket."""
    store = RemoteFolder(Path(release.url))
    return replace(release, store=store), store
