"""Where every thread of this process is, by modules and lines: no paths, no values, so nothing that could name a person."""

import sys
import threading
from traceback import walk_stack
from types import FrameType

DEEPEST = 40
# A thread that is in one of these waits for other ranks.
COLLECTIVES = ("torch.distributed", "deepspeed.comm")
OURS = "draf_dist."
Stack = list[str]


def stacks() -> dict[str, Stack]:
    """Name of a thread -> its frames, innermost first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {f"{names.get(ident, 'thread')}-{ident}": _stack(frame) for ident, frame in sys._current_frames().items()}


def stack_of(ident: int) -> Stack:
    """The frames of one thread, innermost first; none where it has ended."""
    frame = sys._current_frames().get(ident)
    return [] if frame is None else _stack(frame)


def waits_for_others(stack: Stack) -> bool:
    """Whether a thread is inside a collective."""
    return any(line.startswith(COLLECTIVES) for line in stack)


def innermost(stack: Stack) -> str:
    """Where a thread is, in one line: its innermost frame in this package, or else its innermost frame."""
    return next((line for line in stack if line.startswith(OURS)), stack[0] if stack else "nowhere")


def _stack(frame: FrameType) -> Stack:
    found = ((walked.f_globals.get("__name__", "?"), line, walked.f_code.co_name) for walked, line in walk_stack(frame))
    return [f"{module}:{line} {name}" for (module, line, name), _ in zip(found, range(DEEPEST), strict=False)]
