"""What a user can cause, and the exit code that each kind of error gives.

Every message says where, what was expected, what was found and what to do. No message names a subject.
"""

from collections.abc import Iterable
from typing import ClassVar


class DrafError(Exception):
    """An error that a user can mend; shown without a traceback."""

    exit_code: ClassVar[int] = 1


class SpecError(DrafError):
    """Wrong usage or a wrong spec; also a path, bucket or URL that was given and does not exist."""

    exit_code = 2


class DataError(DrafError):
    """Data that is there but bad: a broken shard, a missing column, too many quarantined studies."""

    exit_code = 3


class GateError(DrafError):
    """Refused by a gate: a policy, a fence, a check that must hold before something is promoted."""

    exit_code = 4


class InterruptedRunError(DrafError):
    """Stopped before the end in a state from which the same command continues."""

    exit_code = 5


class UnreachableError(DrafError):
    """A store, cluster or registry that can't be reached or refuses the credentials."""

    exit_code = 6


class StorageFullError(DrafError):
    """The disk or bucket has no room left; what was written so far is not a release or checkpoint."""

    exit_code = 1


def explain(where: str, *, expected: str, found: str, remedy: str) -> str:
    """One line in the form that every error of the project has: where - expected - found - remedy."""
    return f"{where}: expected {expected}, found {found}. {remedy}"


def together(problems: Iterable[str]) -> str:
    """All problems of one file in one message, one a line, in the order found."""
    return "\n".join(problems)
