"""Holds: locks on files and folders that the kernel lets go of when their process ends, however it ends.

What a process is doing in a node cache (a transaction, a fetch, a lease) is a hold. So whether its process still lives is asked
of the kernel, and a kill leaves nothing that has to be guessed stale from an age or a process id.
"""

import fcntl
import os
from pathlib import Path
from weakref import WeakSet


class Hold:
    """A lock on a file or folder that exists. Waits for whoever holds it."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        self.path, self.descriptor = path, -1
        self.descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        _HOLDS.add(self)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            self.drop()

    def release(self) -> None:
        """Lets go; a second time does nothing."""
        if self.descriptor >= 0:
            # Said aloud: closing alone would leave the lock with a child that was forked meanwhile and has not closed its copy yet.
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            self.drop()

    def drop(self) -> None:
        """Closes the descriptor without letting go of the lock for others who share it."""
        os.close(self.descriptor)
        self.descriptor = -1


_HOLDS: "WeakSet[Hold]" = WeakSet()


def _leave_holds_to_the_parent() -> None:
    """A forked child would otherwise keep the locks of a parent that dies."""
    for hold in list(_HOLDS):
        if hold.descriptor >= 0:
            hold.drop()


os.register_at_fork(after_in_child=_leave_holds_to_the_parent)


def is_held(path: Path) -> bool:
    """Whether a live process holds it; False where there is nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that those who ask do not look like holders to one another.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def wait_for(path: Path) -> None:
    """Returns when nobody holds it any more: at once when the holder lets go or dies."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)
