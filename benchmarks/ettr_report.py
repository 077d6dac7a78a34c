"""What kills cost a run: the schedule of kills, and the effective training time ratio from the history of an arm."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True)
class Kill:
    """SIGKILL of a rank's process, so many seconds after the arm began."""

    at_s: float
    rank: int


def schedule(seed: int, seconds: float, mean_s: float, ranks: int) -> list[Kill]:
    """Kills of a Poisson process, given that as many come as are expected; which rank each hits is drawn too.

    Given their number its times are uniform. Without that a quarter of an hour has anything from 8 to 24 kills a minute apart, and
    the ratio is one of that luck.
    """
    draw = random.Random(seed)
    times = sorted(draw.uniform(0, seconds) for _ in range(round(seconds / mean_s)))
    return [Kill(at_s, draw.randrange(ranks)) for at_s in times]


def expected_ratio(between_s: float, save_s: float, restart_s: float, mean_s: float) -> float:
    """The ratio to expect where a checkpoint follows every `between_s` of work.

    between / (M e^(R/M) (e^((between + save)/M) - 1)), where kills also hit saves and restarts (Daly 2006, equation 13).
    """
    return between_s / (mean_s * math.exp(restart_s / mean_s) * math.expm1((between_s + save_s) / mean_s))


@dataclass(frozen=True)
class History:
    """What became of an arm. Times are seconds since 1970.

    began, ended: of the arm, the start of its processes included. kills: when a rank was killed. lines: `attempt` (time, start),
    written once a start of the workers is ready for steps, and `commit` (time, stop), steps done at a checkpoint; in order.
    steps: done according to the newest checkpoint that was durable at the end. step_s: of every step that is known. books: the
    ratio that the arm's own books give, None of an arm that has none.
    """

    arm: str
    began: float
    ended: float
    kills: Sequence[float]
    lines: Sequence[Line]
    steps: int
    step_s: Sequence[float]
    books: float | None = None

    @property
    def wall_s(self) -> float:
        """How long the arm ran."""
        return self.ended - self.began

    def ratio(self, step_s: float) -> float:
        """Effective training time ratio: steps that count, each once and at the given undisturbed length, over wall time."""
        return self.steps * step_s / self.wall_s

    def restarts_s(self) -> list[float]:
        """From a kill until the next attempt was ready for steps; kills on the way there are part of it."""
        found, since = [], self.began
        for line in self.lines:
            if line["event"] != "attempt":
                continue
            hits = [kill for kill in self.kills if since < kill <= line["time"]]
            found += [line["time"] - hits[0]] if hits else []
            since = line["time"]
        return found

    def lost_s(self) -> list[float]:
        """Of every kill that ended an attempt: seconds of work since what the next attempt went on from."""
        found = []
        attempts = [number for number, line in enumerate(self.lines) if line["event"] == "attempt"]
        for first, last in zip(attempts, attempts[1:], strict=False):
            mine = self.lines[first:last]
            hits = [kill for kill in self.kills if mine[0]["time"] < kill <= self.lines[last]["time"]]
            kept = [line["time"] for line in mine if line["event"] == "commit" and line["stop"] <= self.lines[last]["start"]]
            found += [hits[0] - max([mine[0]["time"], *kept])] if hits else []
        return found


def of_ledger(lines: Sequence[Line], durable: int) -> list[Line]:
    """The lines of ledger.jsonl that a history has; a commit counts once its checkpoint is there."""
    known = [line for line in lines if line["event"] in ("attempt", "commit")]
    return [line for line in known if line["event"] == "attempt" or line["stop"] <= durable]


def summary(history: History, step_s: float) -> dict[str, Any]:
    """The figures of an arm."""
    restarts, lost = history.restarts_s(), history.lost_s()
    return {
        "arm": history.arm,
        "ratio": history.ratio(step_s),
        "steps": history.steps,
        "wall_s": history.wall_s,
        "kills": len(history.kills),
        "attempts": sum(line["event"] == "attempt" for line in history.lines),
        "restarts": len(restarts),
        "restart_s": median(restarts) if restarts else 0.0,
        "longest_restart_s": max(restarts, default=0.0),
        "lost_s": sum(lost),
        "lost_steps": sum(lost) / step_s,
        "step_s": median(history.step_s) if history.step_s else math.nan,
        "books": history.books,
    }
