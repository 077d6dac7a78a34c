"""Retries as arithmetic: without a clock, a network or a store."""

import errno
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError, NoRegionError, ReadTimeoutError, SSLError

from draf_dist.errors import SpecError
from draf_dist.storage import LocalStore
from draf_dist.storage.retry import (
    GivenUpError,
    Reason,
    RequestError,
    RetryPolicy,
    policy_from_environment,
    reason_of,
    repeated,
    sleep_unless_ending,
    stall_timeout_s,
)
from draf_dist.storage.s3_errors import request_error
from draf_dist.storage.traffic import Traffic


class Clock:
    """Time that passes only by waiting, and by what attempts are said to take."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return True


def failing(times: int, clock: Clock, *, reason: Reason | None = Reason.SERVER, taking_s: float = 0.0) -> Callable[[], str]:
    """Something that fails so often before it succeeds, and takes so long each time."""
    left = [times]

    def act() -> str:
        clock.now += taking_s
        left[0] -= 1
        if left[0] >= 0:
            raise RequestError("it failed", reason=reason)
        return "done"

    return act


def run(act: Callable[[], str], policy: RetryPolicy, clock: Clock, share: float = 1.0) -> tuple[str, Traffic]:
    traffic = Traffic()
    kept = {"clock": lambda: clock.now, "sleep": clock.sleep, "draw": lambda: share}
    return repeated(act, policy, on_retry=traffic.add_retry, **kept), traffic


def test_waits_double_up_to_the_longest() -> None:
    policy = RetryPolicy(first_wait_s=0.1, longest_wait_s=8.0)
    assert [policy.ceiling_s(failures) for failures in (1, 2, 3, 7, 8, 1000)] == [0.1, 0.2, 0.4, 6.4, 8.0, 8.0]


def test_jitter_is_full() -> None:
    policy, draws = RetryPolicy(first_wait_s=1.0), random.Random(0)
    waits = [policy.wait_s(3, share=draws.random(), failing_for_s=0) for _ in range(4000)]
    counts = [sum(1 for wait in waits if quarter <= wait < quarter + 1) for quarter in range(4)]
    assert sum(counts) == 4000  # all in [0, 4)
    assert all(900 < count < 1100 for count in counts)


def test_jitter_neither_follows_nor_moves_the_seeds_of_a_training() -> None:
    def waits() -> list[float]:
        random.seed(1)
        taken: list[float] = []
        clock = Clock()
        repeated(
            failing(3, clock),
            RetryPolicy(),
            on_retry=lambda _, wait: taken.append(wait),
            clock=lambda: clock.now,
            sleep=clock.sleep,
        )
        return taken

    assert waits() != waits()
    random.seed(1)
    assert random.Random(1).random() == random.random()


def test_a_failure_that_passes_costs_its_waits_only() -> None:
    clock = Clock()
    result, traffic = run(failing(4, clock), RetryPolicy(), clock)
    assert result == "done"
    assert clock.waits == [0.1, 0.2, 0.4, 0.8]
    counted = traffic.snapshot()
    assert (counted.retries, counted.by_reason) == (4, {Reason.SERVER: 4})
    assert counted.retry_wait_s == pytest.approx(1.5)


def test_the_last_attempt_is_made_when_the_time_is_over_and_not_later() -> None:
    clock = Clock()
    with pytest.raises(GivenUpError) as caught:
        run(failing(10**6, clock), RetryPolicy(retry_for_s=120), clock)
    assert sum(clock.waits) == pytest.approx(120)
    assert max(clock.waits) == 8.0
    assert caught.value.seconds == pytest.approx(120)
    assert caught.value.attempts == len(clock.waits) + 1


def test_a_transfer_that_breaks_after_minutes_is_repeated() -> None:
    clock = Clock()
    result, _ = run(failing(1, clock, taking_s=300), RetryPolicy(retry_for_s=120), clock)
    assert result == "done"


def test_no_time_means_one_attempt() -> None:
    clock = Clock()
    with pytest.raises(GivenUpError) as caught:
        run(failing(1, clock), RetryPolicy(retry_for_s=0), clock)
    assert (caught.value.attempts, clock.waits) == (1, [])


def test_what_would_fail_again_is_not_repeated() -> None:
    clock = Clock()
    with pytest.raises(RequestError):
        run(failing(1, clock, reason=None), RetryPolicy(), clock)
    assert clock.waits == []


def test_a_thread_stops_trying_when_the_program_ends() -> None:
    clock = Clock()
    with pytest.raises(GivenUpError) as caught:
        repeated(
            failing(9, clock),
            RetryPolicy(),
            on_retry=lambda *_: None,
            clock=lambda: clock.now,
            sleep=lambda _: False,
            draw=lambda: 1,
        )
    assert caught.value.attempts == 1
    assert sleep_unless_ending(0.01)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (503, "SlowDown", Reason.THROTTLED),
        (503, "", Reason.THROTTLED),
        (429, "", Reason.THROTTLED),
        (500, "InternalError", Reason.SERVER),
        (502, "", Reason.SERVER),
        (504, "GatewayTimeout", Reason.SERVER),
        (400, "RequestTimeout", Reason.STALLED),
        (409, "ConditionalRequestConflict", Reason.CONFLICT),
        (400, "InvalidArgument", None),
        (401, "", None),
        (403, "ExpiredToken", None),
        (404, "NoSuchKey", None),
        (412, "PreconditionFailed", None),
        (416, "InvalidRange", None),
        (501, "NotImplemented", None),
        (507, "InsufficientStorage", None),
    ],
)
def test_answers_that_may_change_are_told_from_those_that_stay(status: int, code: str, reason: Reason | None) -> None:
    assert reason_of(status, code) == reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ReadTimeoutError(endpoint_url="x"), Reason.STALLED),
        (TimeoutError(), Reason.STALLED),
        (EndpointConnectionError(endpoint_url="x"), Reason.CONNECTION),
        (ConnectionResetError(errno.ECONNRESET, "reset"), Reason.CONNECTION),
        (OSError(errno.ENETUNREACH, "no network"), Reason.CONNECTION),
        (aiohttp.ClientPayloadError("half"), Reason.SHORT),
        (OSError(errno.EIO, "the local disk"), None),
        (SSLError(endpoint_url="x", error="certificate"), None),
        (NoCredentialsError(), None),
        (NoRegionError(), None),
        (FileNotFoundError(), None),
    ],
    ids=repr,
)
def test_a_network_that_fails_is_told_from_what_stays_wrong(error: Exception, reason: Reason | None) -> None:
    assert request_error(error).reason == reason


def test_times_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRAF_RETRY_FOR_S", raising=False)
    monkeypatch.delenv("DRAF_STALL_TIMEOUT_S", raising=False)
    assert policy_from_environment().retry_for_s == 120
    assert stall_timeout_s() == 10
    monkeypatch.setenv("DRAF_RETRY_FOR_S", "3.5")
    assert policy_from_environment().retry_for_s == 3.5
    for variable, wrong, read in (
        ("DRAF_RETRY_FOR_S", "2 min", policy_from_environment),
        ("DRAF_RETRY_FOR_S", "-1", policy_from_environment),
        ("DRAF_RETRY_FOR_S", "inf", policy_from_environment),
        ("DRAF_STALL_TIMEOUT_S", "0", stall_timeout_s),
    ):
        monkeypatch.setenv(variable, wrong)
        with pytest.raises(SpecError, match=variable):
            read()


def test_counts_of_many_threads_add_up() -> None:
    traffic = Traffic()

    def count() -> None:
        for _ in range(1000):
            traffic.add_request()
            traffic.add_read(3)
            traffic.add_retry(Reason.STALLED, 0.5)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = traffic.snapshot()
    assert (counted.requests, counted.bytes_read, counted.retries, counted.retry_wait_s) == (8000, 24_000, 8000, 4000)


def test_a_folder_counts_too_and_its_copy_in_another_process_from_zero(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("a", b"0123456789")
    store.read("a")
    store.read_ranges("a", [(0, 3), (8, 20)])
    counted = store.traffic.snapshot()
    assert (counted.requests, counted.bytes_read, counted.bytes_written, counted.retries) == (4, 15, 10, 0)
    assert pickle.loads(pickle.dumps(store)).traffic.snapshot().requests == 0
