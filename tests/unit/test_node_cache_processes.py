"""The node cache among processes that ask at once, and among those that are killed, wherever they are at that moment.

All come from a fork server that has read the code already: reading it eight times would take longer than all else.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from cached_blocks import JOB, SIZE, Origin, content, get, key, lying

from draf_dist.data.node_cache import BlockKey, Lease, NodeCache
from draf_dist.errors import SpecError

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "numpy", "draf_dist.data.node_cache"])
LIMIT = 4 * SIZE
WAIT_S = 60
# Of some 840 lines; all of them were tried once.
STRIDE = 29


def started(target: Any, *args: Any) -> Any:
    process = PROCESSES.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join(WAIT_S)


# Eight ask at once


def ask(folder: Path, log: Path, seed: int, together: Any) -> None:
    """Three threads of a process read all of forty blocks, each in its own order."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)

    def fetch(keys: Sequence[BlockKey]) -> list[bytes]:
        os.write(file, "".join(f"{block}\n" for block in keys).encode())
        time.sleep(0.002)
        return [content(block) for block in keys]

    def walk(lease: Lease, thread: int) -> None:
        order = random.Random(100 * seed + thread).sample(range(40), 40)
        for start in range(0, 40, 4):
            part = order[start : start + 4]
            assert [block.read(0, SIZE) for block in get(lease, fetch, part, until=9)] == [content(key(n)) for n in part]

    together.wait(WAIT_S)
    with NodeCache(folder, 40 * SIZE).lease(JOB, 40 * SIZE) as lease, ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(walk, lease, thread) for thread in range(3)]:
            done.result()
        stats = lease.stats
        assert stats.hits + stats.waited + stats.misses >= 120


def test_eight_processes_with_three_threads_each_fetch_each_block_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    together = PROCESSES.Barrier(8)
    processes = [started(ask, tmp_path / "cache", log, seed, together) for seed in range(8)]
    for process in processes:
        process.join(WAIT_S)
    assert [process.exitcode for process in processes] == [0] * 8
    assert Counter(log.read_text().splitlines()) == {str(key(n)): 1 for n in range(40)}
    cache = NodeCache(tmp_path / "cache", 40 * SIZE)
    assert cache.size_bytes == sum(lying(cache).values()) == 40 * SIZE
    assert list((cache.folder / "unfinished").iterdir()) == list((cache.folder / "leases").iterdir()) == []


# One is killed while it fetches


def fetch_for_ever(folder: Path, begun: Any) -> None:
    def stuck(keys: Sequence[BlockKey]) -> list[bytes]:
        begun.set()
        time.sleep(WAIT_S)
        raise AssertionError("nobody has killed us")

    get(NodeCache(folder, LIMIT).lease(JOB, LIMIT), stuck, [0, 1], until=5)


def test_another_takes_over_within_a_second_when_the_process_that_fetches_is_killed(tmp_path: Path) -> None:
    begun = PROCESSES.Event()
    fetching = started(fetch_for_ever, tmp_path / "cache", begun)
    assert begun.wait(WAIT_S)
    cache, origin = NodeCache(tmp_path / "cache", LIMIT), Origin()
    with cache.lease(JOB, LIMIT) as lease, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(get, lease, origin, [1, 0, 2], 5) for _ in range(2)]
        time.sleep(0.1)
        assert origin.counts in ({}, {key(2): 1})
        assert not any(future.done() for future in waiting)
        start = time.monotonic()
        kill(fetching)
        for future in waiting:
            assert [block.read(0, SIZE) for block in future.result(WAIT_S)] == [content(key(n)) for n in (1, 0, 2)]
        assert time.monotonic() - start < 1
        assert origin.counts == {key(n): 1 for n in range(3)}
        assert cache.size_bytes == sum(lying(cache).values()) == 3 * SIZE
        assert list((cache.folder / "unfinished").iterdir()) == []


# One is killed at any line


class Bomb:
    """Kills the process at the n-th line of the cache that it runs; says how many there were if it comes to the end."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: FrameType, event: str, arg: object) -> "Bomb | None":
        if "node_cache" not in frame.f_code.co_filename or "test" in frame.f_code.co_filename:
            return None
        if event == "line":
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def life(folder: Path, numbers: Sequence[int], line: int) -> None:
    """All that a process does with a cache, up to a line."""
    sys.settrace(Bomb(line))
    with NodeCache(folder, LIMIT).lease(JOB, 2 * SIZE) as lease:
        lease.advance(0)
        get(lease, Origin(), numbers, until=0)
        lease.forget([key(numbers[1])])
        lease.advance(1)


def killed(folder: Path, numbers: Sequence[int], line: int) -> bool:
    """Whether it was; False if it has come to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            life(folder, numbers, line)
        finally:
            sys.settrace(None)
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def kill_at_many_lines(folder: Path, alone: bool, first: int, stride: int, answer: Any) -> None:
    """Kills a process at every so-manieth line, each time looks at what another one finds; answers with the number of kills."""
    line, kills = first, 0
    cache = NodeCache(folder, LIMIT)
    keeper = None if alone else cache.lease("another", SIZE)
    while killed(folder, numbers := [2 * line, 2 * line + 1], line):
        for block in lying(cache):
            assert (folder / "blocks" / block[0][:2] / f"{block[0]}-{block[1]}").read_bytes() == content(block), line
        lease = keeper or cache.lease("another", SIZE)
        lease.advance(line)
        blocks = get(lease, Origin(), numbers, until=line)
        assert [block.read(0, SIZE) for block in blocks] == [content(key(n)) for n in numbers]
        assert cache.size_bytes == sum(lying(cache).values()) <= LIMIT, line
        if alone:
            lease.close()
        line, kills = line + stride, kills + 1
    with cache.lease(JOB, SIZE):
        assert len(list((folder / "leases").iterdir())) == (1 if alone else 2)
    if keeper:
        keeper.close()
        cache.lease(JOB, SIZE).close()
    assert list((folder / "unfinished").iterdir()) == []
    assert cache._index.generation == 1, "no kill damages the index"
    answer.put((line, kills))


@pytest.mark.parametrize(("alone", "first"), [(True, 1), (False, 3)], ids=["alone", "beside another"])
def test_a_kill_at_any_line_leaves_nothing_half_written_and_no_byte_uncounted(tmp_path: Path, alone: bool, first: int) -> None:
    answer = PROCESSES.Queue()
    process = started(kill_at_many_lines, tmp_path / "cache", alone, first, STRIDE, answer)
    lines, kills = answer.get(timeout=WAIT_S)
    process.join(WAIT_S)
    assert process.exitcode == 0
    assert lines > 300
    assert kills > 20


# One is killed that holds a lease


def need_everything(folder: Path, begun: Any) -> None:
    lease = NodeCache(folder, LIMIT).lease("killed", LIMIT)
    get(lease, Origin(), range(4), until=10**9)
    begun.set()
    time.sleep(WAIT_S)


def test_what_a_killed_job_needed_does_not_count_any_more(tmp_path: Path) -> None:
    begun = PROCESSES.Event()
    holder = started(need_everything, tmp_path / "cache", begun)
    assert begun.wait(WAIT_S)
    cache = NodeCache(tmp_path / "cache", LIMIT)
    with pytest.raises(SpecError, match=r"this job needs 1 bytes, job killed 4\.0 kB"):
        cache.lease(JOB, 1)
    with cache.lease(JOB, 0) as lease:
        with pytest.warns(RuntimeWarning):
            get(lease, Origin(), [4], until=0)
        assert lease.stats.evicted == 0
    kill(holder)
    with cache.lease(JOB, LIMIT) as lease:
        get(lease, Origin(), range(5, 9), until=5)
        assert lease.stats.over_limit_bytes == 0
        assert set(lying(cache)) == {key(n) for n in range(5, 9)}


# Forks


def fork_and_wait(folder: Path, answer: Any) -> None:
    cache = NodeCache(folder, LIMIT)
    cache.lease("parent", LIMIT)
    leases = [cache.lease("parent", LIMIT)]
    said = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            get(leases[0], Origin(), [0], until=5)
        except ValueError as error:
            os.write(said[1], str(error).encode())
        time.sleep(WAIT_S)
        os._exit(0)
    answer.put((pid, os.read(said[0], 1000).decode()))
    time.sleep(WAIT_S)


def test_a_forked_child_neither_keeps_the_leases_of_a_killed_parent_nor_uses_its_cache(tmp_path: Path) -> None:
    answer = PROCESSES.Queue()
    parent = started(fork_and_wait, tmp_path / "cache", answer)
    child, said = answer.get(timeout=WAIT_S)
    try:
        assert said == "this node cache was opened in another process; make a new one in this"
        cache = NodeCache(tmp_path / "cache", LIMIT)
        with pytest.raises(SpecError, match="job parent"):
            cache.lease(JOB, LIMIT)
        kill(parent)
        cache.lease(JOB, LIMIT).close()
    finally:
        os.kill(child, signal.SIGKILL)
