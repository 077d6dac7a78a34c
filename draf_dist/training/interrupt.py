"""SIGINT and SIGTERM ask the run to stop; it does so after the step in hand, with a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType


class Interrupt:
    """While entered, remembers that a signal came instead of dying of it. A second one acts as it would have before.

    Only the main thread can be told of signals; elsewhere this does nothing. A signal that is ignored stays ignored.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                # Whoever started this process may have decided that it is not to hear of one.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
