"""Work on many things at once in threads, with the results in their order: what comes of it does not depend on how many at once.

Threads and not processes: encoders, decoders, checksums and requests all release the interpreter's lock, and whole images need not
be copied from one process to another.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
# Things in hand for each thread: enough that none waits for a slow neighbour, few enough for memory.
AHEAD = 2


def in_order(items: Iterable[ItemT], work: Callable[[ItemT], ResultT], jobs: int) -> Iterator[tuple[ItemT, Callable[[], ResultT]]]:
    """Every item with a function that gives its result, or raises what the work raised.

    With one job the function does the work when it is called, in the thread that calls it.
    """
    if jobs == 1:
        for item in items:
            yield item, partial(work, item)
        return
    waiting: deque[tuple[ItemT, Future[ResultT]]] = deque()
    pool = ThreadPoolExecutor(jobs)
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) >= AHEAD * jobs:
                first, future = waiting.popleft()
                yield first, future.result
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result
    finally:
        pool.shutdown(cancel_futures=True)
