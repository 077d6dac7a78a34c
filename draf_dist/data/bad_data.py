"""What happens to a member that can't be used: the run ends (the default), or it is left out, counted and told.

Left out is that member alone: an image that does not decode is an absent image; a sample of which nothing is left, or whose json is
gone, is a row of padding. What is left out depends on the data alone, so it is the same on any rank and in any attempt. The limit
is asked of what one desk has seen: one rank in one attempt, or one pass over a split.
"""

import threading
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from draf_dist.config.spec import Spec
from draf_dist.errors import DataError, explain

Policy = Literal["fail", "quarantine"]
# So many are told one by one; the others are only counted.
LISTED = 100
# Before so many were read a share says little: one of the first ten would be a tenth.
FIRST_MEMBERS = 1000


class BadData(Spec):
    """policy: `fail` or `quarantine`. limit: the share of the members read that may be left out before the run ends after all.

    It counts for every rank and attempt by itself, and for every pass over the validation split. The first thousand members count
    as a thousand, however few were read yet.
    """

    policy: Policy = "fail"
    limit: float = Field(0.01, gt=0, lt=1)

    def is_exceeded(self, num_left_out: int, num_read: int) -> bool:
        """Whether too many members of those read were left out."""
        return num_left_out > self.limit * max(num_read, FIRST_MEMBERS)


# What is asked for where nothing is said.
STRICT = BadData()
# A limit for who asks later, of several parts together.
UNLIMITED = 1.0


@dataclass(frozen=True)
class LeftOut:
    """One member (or a whole sample) that was left out: at which step first, where it lies and what is wrong with it."""

    step: int
    message: str


class BadDataDesk:
    """Decides and counts for one loader; safe to ask from several threads.

    num_read, num_left_out: members. num_lost: samples of which nothing was left. local_bytes: read from shards on a disk.
    """

    def __init__(self, rule: BadData, where: str) -> None:
        self._rule, self._where = rule, where
        self._lock = threading.Lock()
        self.num_read = self.num_left_out = self.num_lost = self.local_bytes = 0
        self._listed: dict[str, LeftOut] = {}

    @property
    def listed(self) -> list[LeftOut]:
        """The first that were left out, each once, however often it was asked for."""
        with self._lock:
            return list(self._listed.values())

    def read(self, num: int, num_lost: int, local_bytes: int) -> None:
        """Counts a chunk: members that were asked for, samples that were lost, bytes that came from a disk."""
        with self._lock:
            self.num_read += num
            self.num_lost += num_lost
            self.local_bytes += local_bytes

    def leave_out(self, step: int, error: DataError) -> None:
        """Says that a member is to be left out; returns if it may be.

        Raises:
            DataError: the error itself under `fail`; else, that there are too many.
        """
        if self._rule.policy == "fail":
            raise error
        with self._lock:
            self.num_left_out += 1
            if len(self._listed) < LISTED:
                self._listed.setdefault(str(error), LeftOut(step, str(error)))
            too_many = self._rule.is_exceeded(self.num_left_out, self.num_read)
        if too_many:
            raise self._too_many(error)

    def _too_many(self, error: DataError) -> DataError:
        return DataError(
            explain(
                self._where,
                expected=f"at most {self._rule.limit:.1%} of the members unusable",
                found=f"{self.num_left_out} of {self.num_read}; the last one: {error}",
                remedy="Run draf release verify; restore the files, or allow a larger share.",
            )
        )
