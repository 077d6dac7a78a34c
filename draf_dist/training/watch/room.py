"""A memory or a disk that is full, in words that say what to lower."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from draf_dist.errors import DrafError, StorageFullError, explain
from draf_dist.storage.local import NO_ROOM, full
from draf_dist.training.backend import Backend

CGROUP = Path("/sys/fs/cgroup")
# What torch says where it gets no memory on the CPU; it has no class of its own for that.
_CPU_WORDS = ("can't allocate memory", "not enough memory", "cannot allocate memory")
_ON_DEVICE = "a smaller batch_size (another run) or smaller images in the release"
_ON_HOST = "fewer decode_threads or ranks on a node, a smaller open_samples or batch_size, or more memory"


class OutOfMemoryError(DrafError):
    """No memory left, on the device or the machine. The same command would meet it again."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory, on a device or the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _CPU_WORDS)


@contextmanager
def told_what_to_lower(backend: Backend) -> Iterator[None]:
    """Turns what a full memory or disk raises inside the block into an error that says what to lower.

    Raises:
        OutOfMemoryError: no memory.
        StorageFullError: no room on a disk, where nobody has said so yet.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            raise _no_memory(backend, of_device=isinstance(error, torch.OutOfMemoryError)) from error
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise _no_room(Path(str(error.filename or tempfile.gettempdir()))) from error
        raise


def oom_kills(cgroup: Path = CGROUP) -> int | None:
    """How many processes of this one's group the kernel has killed for memory; None where it does not say."""
    for name in (f"{_own_group()}/memory.events", "memory.events", "memory/memory.oom_control"):
        try:
            words = (cgroup / name).read_text().split()
        except OSError:
            continue
        if "oom_kill" in words:
            return int(words[words.index("oom_kill") + 1])
    return None


def _own_group() -> str:
    """The path of this process's group below the root of all (cgroup v2); "." where it does not say."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "."
    return next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "") or "."


def _no_memory(backend: Backend, *, of_device: bool) -> OutOfMemoryError:
    place = str(backend.device) if of_device else "this machine"
    more = backend.accumulation * 2
    first = f"Set accumulation: {more} in the profile (found {backend.accumulation}): it gives the same result."
    remedy = f"{first} Or {_ON_DEVICE if of_device else _ON_HOST}."
    if of_device and backend.world > 1:
        remedy += " Or a higher deepspeed.zero_stage, or precision bf16."
    return OutOfMemoryError(explain(f"memory of {place}", expected="room for a step", found="none left", remedy=remedy))


def _no_room(path: Path) -> StorageFullError:
    """The words of every other full disk, and what a run can do with less of."""
    more = "Or set checkpoint.keep lower, or TMPDIR to a larger disk."
    return StorageFullError(f"{full(str(path), path)} {more}")
