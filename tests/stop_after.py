"""Asking a run to stop, as a signal does."""

from dataclasses import dataclass


@dataclass
class StopAfter:
    """Asks to stop after so many steps of this attempt, where batches of validation count as steps."""

    steps: int
    asked: int = 0

    @property
    def requested(self) -> str | None:
        self.asked += 1
        return "SIGTERM" if self.asked >= self.steps else None
