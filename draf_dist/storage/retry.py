"""When a request that failed is made again, when not any more, and how long to wait. Nothing here knows a store or a network."""

import itertools
import math
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from draf_dist.errors import SpecError, explain

Result = TypeVar("Result")

RETRY_FOR_S = 120.0
STALL_TIMEOUT_S = 10.0
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 8.0
_LOOK_S = 0.25  # how soon a waiting thread sees that the program ends

# Neither seeded by what seeds a training, or all its ranks would wait equally long, nor drawn from the training's numbers.
_draw = random.SystemRandom().random


class Reason(StrEnum):
    """Why a request is worth repeating."""

    THROTTLED = "throttled"
    SERVER = "server error"
    CONNECTION = "connection"
    SHORT = "short body"
    STALLED = "stalled"
    CONFLICT = "conflict"


THROTTLED_CODES = ("SlowDown", "ServiceUnavailable", "TooManyRequests", "Throttling", "ThrottlingException", "RequestLimitExceeded")
CONFLICT_CODES = ("ConditionalRequestConflict", "OperationAborted")
# 5xx that stay what they are: not implemented, unknown version of HTTP, no room.
LASTING_STATUSES = (501, 505, 507)


class RequestError(Exception):
    """A request that failed.

    Attributes:
        found: What happened, for messages; nothing of a request or an answer besides S3's code.
        reason: Why to repeat it; None: it would fail again.
        status: HTTP status of the answer, 0 where there was none.
        code: S3's code in the answer, empty where there was none.
    """

    def __init__(self, found: str, *, reason: Reason | None = None, status: int = 0, code: str = "") -> None:
        super().__init__(found)
        self.found, self.reason, self.status, self.code = found, reason, status, code


class GivenUpError(Exception):
    """A request that was repeated until the time for it was over.

    Attributes:
        last: The last failure.
        attempts: How often it was made.
        seconds: From the first attempt to the end of the last.
    """

    def __init__(self, last: RequestError, attempts: int, seconds: float) -> None:
        super().__init__(last.found)
        self.last, self.attempts, self.seconds = last, attempts, seconds


def reason_of(status: int, code: str) -> Reason | None:
    """Why an answer with this status and code of S3's may be another next time; None where it won't."""
    if status == 429 or code in THROTTLED_CODES or (status == 503 and not code):
        return Reason.THROTTLED
    if code in CONFLICT_CODES:
        return Reason.CONFLICT
    if code == "RequestTimeout":  # 400: the server waited in vain for the rest of a body
        return Reason.STALLED
    return Reason.SERVER if 500 <= status < 600 and status not in LASTING_STATUSES else None


@dataclass(frozen=True)
class RetryPolicy:
    """How long to go on after a first failure, and how long to wait before an attempt.

    Waits have full jitter: a share drawn evenly from [0, 1) of a ceiling that doubles with every attempt. So clients that failed
    together don't come back together.
    """

    retry_for_s: float = RETRY_FOR_S
    first_wait_s: float = FIRST_WAIT_S
    longest_wait_s: float = LONGEST_WAIT_S

    def ceiling_s(self, failures: int) -> float:
        """The longest wait after so many failures in a row (1 or more)."""
        return min(self.longest_wait_s, math.ldexp(self.first_wait_s, min(failures - 1, 60)))

    def wait_s(self, failures: int, *, share: float, failing_for_s: float) -> float | None:
        """The wait before the next attempt, None: give up. The last attempt is made when the time ends, not before.

        The time counts from the first failure: a transfer that takes minutes and then breaks has not failed for minutes.
        """
        left = self.retry_for_s - failing_for_s
        return None if left <= 0 else min(share * self.ceiling_s(failures), left)


def sleep_unless_ending(seconds: float) -> bool:
    """Waits; says whether to go on. A thread that waits for a dead server would keep a program that ends from ending."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and threading.main_thread().is_alive():
        time.sleep(min(left, _LOOK_S))
    return threading.main_thread().is_alive()


def repeated(
    act: Callable[[], Result],
    policy: RetryPolicy,
    *,
    on_retry: Callable[[Reason, float], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], bool] = sleep_unless_ending,
    draw: Callable[[], float] = _draw,
) -> Result:
    """What act returns, made again while it fails for a reason that may pass; on_retry gets every reason and wait.

    Raises:
        RequestError: act's, if it has no reason to be made again.
        GivenUpError: the time of the policy is over, or the program ends.
    """
    started, failed_at = clock(), math.inf
    for attempt in itertools.count(1):
        try:
            return act()
        except RequestError as error:
            if error.reason is None:
                raise
            now = clock()
            failed_at = min(failed_at, now)
            wait = policy.wait_s(attempt, share=draw(), failing_for_s=now - failed_at)
            if wait is None:
                raise GivenUpError(error, attempt, now - started) from error
            on_retry(error.reason, wait)
            if not sleep(wait):
                raise GivenUpError(error, attempt, clock() - started) from error
    raise AssertionError("unreachable: the loop ends only by return or raise")


def policy_from_environment() -> RetryPolicy:
    """The policy with DRAF_RETRY_FOR_S, where it is set: 0 or more seconds, 0 for no second attempt."""
    return RetryPolicy(retry_for_s=_seconds("DRAF_RETRY_FOR_S", RETRY_FOR_S))


def stall_timeout_s() -> float:
    """Seconds without a byte after which a connection is given up: DRAF_STALL_TIMEOUT_S, or 10."""
    found = _seconds("DRAF_STALL_TIMEOUT_S", STALL_TIMEOUT_S)
    if not found:
        raise SpecError(explain("DRAF_STALL_TIMEOUT_S", expected="seconds above 0", found="0", remedy="Correct the variable."))
    return found


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise SpecError(explain(variable, expected="a number of seconds", found=repr(text), remedy="Correct the variable."))
    return found
