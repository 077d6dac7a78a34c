"""Holds: locks on files and folders that the kernel lets go of when their process ends, however it ends.

What a process is doing in a node cache (a transaction, a fetch, a lease) is a hold. So whether its process still lives is asked
of the kernel, and a kill leaves nothing that has to be guessed stale from an age or a process id.
"""

import fcntl
import os
import time
from pathlib import Path
from weakref import WeakSet

# How soon somebody who waits sees that a lock is free: at first, and after a while.
_FIRST_LOOK_S, _LOOK_S = 0.0002, 0.01


class Hold:
    """A lock on a file or folder that exists. Waits for whoever holds it, but not for ever: a stopped process holds on.

    Raises:
        TimeoutError: it is held by another for patience_s.
    """

    def __init__(self, path: Path, patience_s: float, *, writable: bool = False) -> None:
        self.path, self.descriptor = path, -1
        self.descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        if not _locked(self.descriptor, fcntl.LOCK_EX, patience_s):
            self.drop()
            raise TimeoutError(f"held for {patience_s:.0f} s")
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


def wait_for(path: Path, patience_s: float) -> bool:
    """Whether nobody holds it any more, within patience_s: as soon as the holder lets go or dies."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        return _locked(descriptor, fcntl.LOCK_SH, patience_s)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, kind: int, patience_s: float) -> bool:
    """Whether the lock was to be had in time. The kernel's own waiting has no limit, so it is asked again and again."""
    until, pause = time.monotonic() + patience_s, _FIRST_LOOK_S
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LOOK_S)
        else:
            return True
