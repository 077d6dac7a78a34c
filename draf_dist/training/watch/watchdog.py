"""Notices a step that does not end, and finds out which rank did not arrive.

A thread of every rank looks at the clock. Where a step lasts longer than LIMIT_FACTOR times the median one, it calls all ranks
over the board (board.py); each answers where it is. A rank that is in an earlier step, waits for data, is in no collective, or does
not answer has not arrived. The thread ends nothing: the process group's own timeout does.
"""

import json
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from draf_dist.errors import explain
from draf_dist.training.watch.board import Board
from draf_dist.training.watch.stacks import innermost, stack_of, waits_for_others

LIMIT_FACTOR = 10.0
# A first step compiles, and a store may take its time.
FLOOR_S = 30.0
POLL_S = 1.0
REMEMBERED = 64
# What a rank does alone between steps (a checkpoint that it uploads) may take so many times longer.
BETWEEN_FACTOR = 10.0
CALL = "call"
Phase = Literal["between", "data", "step"]
_WORDS: dict[Phase, str] = {"between": "between steps", "data": "waiting for data", "step": "computing"}


class HungError(RuntimeError):
    """A step did not end because ranks did not arrive. No error that a user must mend: another attempt may get through."""


@dataclass(frozen=True)
class Position:
    """Where a rank is. step: the one that it is in or comes to; since: by time.monotonic()."""

    step: int
    phase: Phase
    since: float


@dataclass(frozen=True)
class Answer:
    """What a rank says when called. waits: it is inside a collective; where: its innermost line of this package."""

    step: int
    phase: Phase
    waits: bool
    where: str


@dataclass(frozen=True)
class Hang:
    """A step that lasts too long. answers: rank -> what it says, None of one that does not answer."""

    step: int
    lasted_s: float
    answers: dict[int, Answer | None]

    @property
    def missing(self) -> list[int]:
        """The ranks that did not arrive."""
        return [rank for rank, answer in self.answers.items() if not self._arrived(answer)]

    def message(self, where: str) -> str:
        """In one line. where: the file with the stacks."""
        missing = self.missing
        told = "; ".join(f"rank {rank}: {_tell(self.answers[rank])}" for rank in missing or self.answers)
        found = told if missing else f"every rank in a collective, which may be different ones ({told})"
        expected = f"all {len(self.answers)} ranks to finish it within {self.lasted_s:.1f} s"
        return explain(f"step {self.step}", expected=expected, found=found, remedy=f"The stacks of all threads are in {where}.")

    def _arrived(self, answer: Answer | None) -> bool:
        return answer is not None and answer.step == self.step and answer.phase == "step" and answer.waits


class Watchdog:
    """Of one rank, while entered. heard: is told of a hang, in the watchdog's thread."""

    def __init__(self, rank: int, world: int, board: Board, heard: Callable[[Hang], None]) -> None:
        self._rank, self._world, self._board, self._heard = rank, world, board, heard
        self._durations: deque[float] = deque(maxlen=REMEMBERED)
        self._trained_by = threading.get_ident()
        self._position = Position(0, "between", time.monotonic())
        self._told: tuple[int, Phase] | None = None
        self._answered: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="draf-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(10 * POLL_S)

    @property
    def limit_s(self) -> float:
        """How long a step may last."""
        durations = tuple(self._durations)
        return max(LIMIT_FACTOR * statistics.median(durations), FLOOR_S) if durations else FLOOR_S

    def at(self, step: int, phase: Phase) -> None:
        """The rank has come to a phase of a step."""
        now, before = time.monotonic(), self._position
        if before.phase == "step" and phase != "step":
            self._durations.append(now - before.since)
        self._position = Position(step, phase, now)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            position = self._position
            self._tell(position)
            called = self._board.get(CALL)
            if self._answered != str(position.step) and self._is_late(position):
                self._board.put(CALL, str(position.step))
                called = str(position.step)
            if called is not None and called != self._answered:
                self._answered = called
                self._answer(called)
                self._heard(self._collect(position, called))

    def _tell(self, position: Position) -> None:
        now = position.step, position.phase
        if now != self._told:
            self._told = now
            self._board.put(f"phase-{self._rank}", position.phase)

    def _is_late(self, position: Position) -> bool:
        lasted, limit = time.monotonic() - position.since, self.limit_s
        if position.phase != "step" or lasted <= limit:
            return False
        phases = (self._board.get(f"phase-{rank}") for rank in range(self._world))
        return lasted > BETWEEN_FACTOR * limit or "between" not in phases

    def _answer(self, called: str) -> None:
        stack, position = stack_of(self._trained_by), self._position
        answer = (position.step, position.phase, waits_for_others(stack), innermost(stack))
        self._board.put(f"answer-{called}-{self._rank}", json.dumps(answer))

    def _collect(self, position: Position, called: str) -> Hang:
        """The answers, once every rank has had the time to give one."""
        until = time.monotonic() + 5 * POLL_S
        while True:
            found = {rank: self._board.get(f"answer-{called}-{rank}") for rank in range(self._world)}
            if None not in found.values() or time.monotonic() > until or self._stop.wait(POLL_S / 5):
                break
        answers = {rank: None if text is None else Answer(*json.loads(text)) for rank, text in found.items()}
        return Hang(int(called), time.monotonic() - position.since, answers)


def _tell(answer: Answer | None) -> str:
    if answer is None:
        return "does not answer"
    return f"{_WORDS[answer.phase]}, step {answer.step}, in {answer.where}"
