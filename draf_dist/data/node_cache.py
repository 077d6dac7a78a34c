"""The node cache: blocks of bytes on a node's disk, shared by all processes of all jobs of a user there.

A block is fetched once, by whoever asks first; the others wait for it. It stays as long as a live process of a job needs it,
and goes only when room is needed. docs/cache.md tells what lies where and how to size it.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from draf_dist.data import node_cache_entries as entries
from draf_dist.data.node_cache_folder import Block, BlockKey, CacheFolder, LiveLease, explained
from draf_dist.data.node_cache_holds import Hold
from draf_dist.data.node_cache_index import BlockIndex
from draf_dist.data.node_cache_lease import CacheStats, Fetch, Lease
from draf_dist.errors import SpecError, explain

__all__ = ["Block", "BlockKey", "CacheStats", "Fetch", "Lease", "NodeCache", "default_cache"]

FOLDER, LIMIT = "DRAF_CACHE_DIR", "DRAF_CACHE_BYTES"
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?))?b?", re.IGNORECASE)


class NodeCache:
    """A folder (made where missing, for this user alone) with at most limit_bytes of blocks.

    A cache that was opened before a fork is not for the child, which opens its own.

    Raises:
        SpecError: the folder is a link, another user's, or one that others can write to.
        StorageFullError, UnreachableError: the disk is full, or refuses.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        with explained(folder):
            self._files = CacheFolder(folder)
        self._index = BlockIndex(self._files)

    @property
    def size_bytes(self) -> int:
        """The bytes of all blocks."""
        with explained(self.folder):
            return self._index.run(entries.total_bytes)

    def lease(self, job: str, needed_bytes: int, part: str = "") -> Lease:
        """What a process must have to read. Processes and passes of one job share needed_bytes; those of different jobs add up.

        job: a name that no other job has. part: the pass of the job, whose steps are counted together.

        Raises:
            SpecError: the limit is less than the live jobs and this one need together.
            UnreachableError: the disk does not answer, or another process has locked the folder and does not go on.
        """
        mine = LiveLease(job, needed_bytes, part)

        def enter(connection: entries.Connection) -> Hold:
            live = self._files.live_leases()
            if not live:
                entries.check(connection, self._files)
            self._check_limit(job, needed_bytes, live)
            if all(lease.name != mine.name for lease in live):
                entries.begin_job(connection, mine.name, live)
            entries.make_room(connection, self._files, self.limit_bytes)
            return self._files.new_lease(mine)

        with explained(self.folder):
            hold, _ = self._index.run_with_room(enter)
        return Lease(self._files, self._index, self.limit_bytes, mine, hold)

    def _check_limit(self, job: str, needed_bytes: int, live: Sequence[LiveLease]) -> None:
        needed = {job: needed_bytes}
        for lease in live:
            needed[lease.job] = max(lease.needed_bytes, needed.get(lease.job, 0))
        together = sum(needed.values())
        if together <= self.limit_bytes:
            return
        others = [f", job {name} {_told(size)}" for name, size in sorted(needed.items()) if name != job]
        found = f"a limit of {_told(self.limit_bytes)} (this job needs {_told(needed[job])}{''.join(others)})"
        remedy = f"Set {LIMIT}={together} or more, or make open_samples or groups of the job smaller"
        remedy += ", or wait until the other jobs on this node have ended." if others else "."
        raise SpecError(explain(str(self.folder), expected=f"room for {_told(together)} of blocks", found=found, remedy=remedy))


def default_cache() -> NodeCache:
    """The cache that the environment names: DRAF_CACHE_DIR and DRAF_CACHE_BYTES.

    By default a folder of this user in the folder for temporary files, and half of what the disk has free (what the cache
    itself holds is free to it).

    Raises:
        SpecError: no size, or no folder of this user's own.
    """
    folder, limit = os.environ.get(FOLDER), os.environ.get(LIMIT)
    own = Path(tempfile.gettempdir()) / f"draf-cache-{os.geteuid()}"
    cache = NodeCache(Path(folder).expanduser() if folder else own, _parsed(limit) if limit else 0)
    if not limit:
        cache.limit_bytes = (shutil.disk_usage(cache.folder).free + cache.size_bytes) // 2
    return cache


def _parsed(limit: str) -> int:
    size = _SIZE.fullmatch(limit.strip())
    number = 0 if size is None else int(float(size[1]) * (1024 if size[3] else 1000) ** " kmgt".index((size[2] or " ").lower()))
    if number < 1:
        remedy = f"Correct the environment variable {LIMIT}, or unset it: then it is half of what the disk has free."
        raise SpecError(
            explain(LIMIT, expected="a size such as 20GB, 500MiB or a number of bytes", found=repr(limit), remedy=remedy)
        )
    return number


def _told(size_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"
