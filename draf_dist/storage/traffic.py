"""What went between this process and a store, counted."""

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from draf_dist.storage.retry import Reason


@dataclass(frozen=True)
class TrafficSnapshot:
    """Counts since the store was opened.

    Attributes:
        requests: Attempts, those that failed among them; the listing of a folder counts as one, however many pages it has.
        bytes_read: Of contents that arrived whole and were handed out.
        bytes_written: Of contents whose writing succeeded.
        retries: Attempts that were made again after a failure.
        retry_wait_s: Seconds waited before them, all threads together.
        by_reason: Retries by their reason.
    """

    requests: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    retries: int = 0
    retry_wait_s: float = 0.0
    by_reason: Mapping[Reason, int] = field(default_factory=dict)


class Traffic:
    """Counters of one store in one process. Any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._read = self._written = 0
        self._wait_s = 0.0
        self._reasons: Counter[Reason] = Counter()

    def __reduce__(self) -> tuple[type["Traffic"], tuple[()]]:
        # Counts belong to the process that made the requests.
        return Traffic, ()

    def add_request(self) -> None:
        """One attempt begins."""
        with self._lock:
            self._requests += 1

    def add_read(self, num_bytes: int) -> None:
        """Content that arrived."""
        with self._lock:
            self._read += num_bytes

    def add_written(self, num_bytes: int) -> None:
        """Content that was written."""
        with self._lock:
            self._written += num_bytes

    def add_retry(self, reason: Reason, wait_s: float) -> None:
        """One attempt is made again after a wait."""
        with self._lock:
            self._reasons[reason] += 1
            self._wait_s += wait_s

    def snapshot(self) -> TrafficSnapshot:
        """All counts at one moment."""
        with self._lock:
            reasons = dict(self._reasons)
            return TrafficSnapshot(self._requests, self._read, self._written, sum(reasons.values()), self._wait_s, reasons)
