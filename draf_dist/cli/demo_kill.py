"""The accident of the demo: one worker process gets SIGKILL in the middle of training."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from draf_dist.errors import DrafError, explain
from draf_dist.launch.ray_desk import Desk

POLL_S = 0.05
VICTIM = 1


@dataclass(frozen=True)
class Kill:
    """What was done. step: steps in metrics.jsonl by then; time: since 1970; rank, pid: whose process it was."""

    step: int
    time: float
    rank: int
    pid: int


class Killer:
    """Kills the second rank of a run once that many steps are done."""

    def __init__(self, run: Path, *, after_step: int) -> None:
        self._metrics = run / "metrics.jsonl"
        self._after_step = after_step
        self._kill: Kill | None = None

    def start(self, desk: Desk) -> None:
        """Watches the run from a thread that ends with this process at the latest."""
        threading.Thread(target=self._watch, args=(desk,), daemon=True).start()

    def result(self) -> Kill:
        """What was done.

        Raises:
            DrafError: the run was over before.
        """
        if self._kill is None:
            found = f"its end after {self._steps()}"
            remedy = "This is a bug: report it with train.log."
            raise DrafError(explain("demo", expected=f"a kill after step {self._after_step}", found=found, remedy=remedy))
        return self._kill

    def _watch(self, desk: Desk) -> None:
        while (done := self._steps()) < self._after_step:
            time.sleep(POLL_S)
        pid = desk.pids()[0][VICTIM]
        self._kill = Kill(step=done, time=round(time.time(), 3), rank=VICTIM, pid=pid)
        os.kill(pid, signal.SIGKILL)

    def _steps(self) -> int:
        return self._metrics.read_text().count('"event": "step"') if self._metrics.exists() else 0
