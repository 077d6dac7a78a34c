"""The node cache beside a process that is stopped (Ctrl-Z, a suspended job): nobody waits for it for ever."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cached_blocks import JOB, SIZE, Origin, content, get, key, lying

from draf_dist.data import node_cache_folder
from draf_dist.data.node_cache import NodeCache
from draf_dist.errors import UnreachableError
from draf_dist.storage.retry import RETRY_FOR_S, STALL_TIMEOUT_S

LIMIT = 10 * SIZE
PATIENCE_S = 0.3
FETCHING = """
import sys, time
from pathlib import Path
from cached_blocks import content, get
from draf_dist.data.node_cache import NodeCache

def fetch(keys):
    print("here", flush=True)
    time.sleep(0.5)
    return [content(block) for block in keys]

get(NodeCache(Path(sys.argv[1]), 10_000).lease("stopped", 2000), fetch, [0, 1], until=5)
print("published", flush=True)
time.sleep(60)
"""
LOCKING = """
import sys, time
from pathlib import Path
from draf_dist.data.node_cache_folder import CacheFolder

with CacheFolder(Path(sys.argv[1])).locked():
    print("here", flush=True)
    time.sleep(0.5)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache_folder, "PATIENCE_S", PATIENCE_S)


@contextmanager
def stopped(program: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is stopped while it is at what its program says."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_waiting_is_longer_than_a_stalled_request_and_shorter_than_a_fetch_may_take() -> None:
    assert 2 * STALL_TIMEOUT_S < 60 < RETRY_FOR_S


def test_what_a_stopped_process_fetches_is_fetched_past_the_cache(tmp_path: Path) -> None:
    cache, origin = NodeCache(tmp_path / "cache", LIMIT), Origin()
    with stopped(FETCHING, cache.folder) as process, cache.lease(JOB, 4 * SIZE) as lease:
        with pytest.warns(RuntimeWarning, match=r"It is stopped, or its store does not answer; `fuser .*unfinished") as told:
            blocks = get(lease, origin, [0, 1, 2], until=5)
        assert [block.read(0, SIZE) for block in blocks] == [content(key(n)) for n in range(3)]
        assert set(lying(cache)) == {key(2)}
        start = time.monotonic()
        # It is known by now: nobody waits or warns again.
        assert get(lease, origin, [1], until=6)[0].read(0, SIZE) == content(key(1))
        assert time.monotonic() - start < PATIENCE_S
        assert len(told) == 1
        assert (lease.stats.misses, lease.stats.fetched_bytes) == (4, 4 * SIZE)
        # It goes on as if nothing had been, and its blocks are everybody's.
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        assert process.stdout.readline() == "published\n"
        get(lease, origin, [0, 1], until=7)
        assert origin.counts == {key(0): 1, key(1): 2, key(2): 1}
        assert set(lying(cache)) == {key(0), key(1), key(2)}
        assert cache.size_bytes == 3 * SIZE


def test_a_folder_that_a_stopped_process_has_locked_is_read_past(tmp_path: Path) -> None:
    cache, origin = NodeCache(tmp_path / "cache", LIMIT), Origin()
    with cache.lease(JOB, 4 * SIZE) as lease, stopped(LOCKING, cache.folder) as process:
        assert lease.there({key(0): 5}) == {}
        with pytest.warns(RuntimeWarning, match=r"perhaps a stopped one\. `fuser") as told:
            blocks = get(lease, origin, [0, 1], until=5)
        assert [block.read(0, SIZE) for block in blocks] == [content(key(n)) for n in range(2)]
        lease.forget([key(0)])
        assert lying(cache) == {}
        assert len(told) == 1
        process.send_signal(signal.SIGCONT)
        time.sleep(0.7)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            get(lease, origin, [0, 1], until=5)
            assert set(lying(cache)) == {key(0), key(1)}


def test_what_was_fetched_before_the_folder_was_locked_for_good_is_handed_out(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", LIMIT)
    with cache.lease(JOB, 4 * SIZE) as lease:
        others: list[Iterator[object]] = []

        def fetch(keys: object) -> list[bytes]:
            locking = stopped(LOCKING, cache.folder)
            locking.__enter__()
            others.append(locking)  # type: ignore[arg-type]
            return [content(key(0))]

        with pytest.warns(RuntimeWarning, match="past the cache"):
            assert get(lease, fetch, [0], until=5)[0].read(0, SIZE) == content(key(0))
        others.pop().__exit__(None, None, None)  # type: ignore[attr-defined]
        origin = Origin()
        get(lease, origin, [0], until=5)
        assert set(lying(cache)) == {key(0)}
        assert cache.size_bytes == SIZE
        assert list((cache.folder / "unfinished").iterdir()) == []


def test_a_job_that_begins_beside_a_locked_folder_is_told_who_has_it(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", LIMIT)
    with stopped(LOCKING, cache.folder), pytest.raises(UnreachableError, match=r"expected the lock of the cache.*fuser"):
        cache.lease(JOB, SIZE)
