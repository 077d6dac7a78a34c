"""The bounded cache that threads share."""

import threading
import time
from collections.abc import Iterator

import pytest

from draf_dist.data.cache import SharedCache
from draf_dist.errors import DataError


def test_the_cache_keeps_what_was_used_last_within_its_limit() -> None:
    made: list[int] = []

    def make(keys: list[int]) -> list[bytes]:
        made.extend(keys)
        return [bytes(10) for _ in keys]

    cache: SharedCache[int, bytes] = SharedCache(30, len)
    for keys in ([1, 2], [2, 3], [1], [4], [2]):
        assert len(cache.get(keys, make)) == len(keys)
        assert cache.size <= 30
    assert made == [1, 2, 3, 4, 2]


@pytest.mark.timeout(30)
def test_threads_that_want_the_same_wait_for_one() -> None:
    made: list[int] = []
    cache: SharedCache[int, int] = SharedCache(100, lambda value: 1)

    def make(keys: list[int]) -> list[int]:
        made.extend(keys)
        time.sleep(0.02)
        return [key * key for key in keys]

    results: list[list[int]] = []
    wanted = ([1, 2, 3], [3, 2, 5], [5, 1, 7], [7, 3, 1])
    threads = [threading.Thread(target=lambda keys=keys: results.append(cache.get(keys, make))) for keys in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(tuple, results)) == sorted(tuple(key * key for key in keys) for keys in wanted)
    assert sorted(made) == [1, 2, 3, 5, 7]


@pytest.mark.timeout(30)
def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    cache: SharedCache[int, int] = SharedCache(100, lambda value: 1)
    begun, failures = threading.Event(), []

    def fail(keys: list[int]) -> list[int]:
        begun.set()
        time.sleep(0.05)
        raise DataError("broken")

    def ask() -> None:
        try:
            cache.get([1], fail)
        except DataError as error:
            failures.append(str(error))

    def threads() -> Iterator[threading.Thread]:
        for _ in range(3):
            thread = threading.Thread(target=ask)
            thread.start()
            begun.wait()
            yield thread

    for thread in list(threads()):
        thread.join()
    assert failures == ["broken"] * 3
    assert cache.get([1], lambda keys: [5]) == [5]
