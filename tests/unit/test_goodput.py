"""What the wall time of a run went into: every second once, whatever happened to its attempts."""

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from draf_dist.training.goodput import KINDS, UNKNOWN, Failure, goodput
from draf_dist.training.journal import Line
from draf_dist.training.progress import WIDTH, described, duration

EVERY = 3
BATCH = 8
NOW = 1.8e9


@dataclass
class Part:
    """Seconds of one kind. stop: of the commit that they belong to, None before there is one."""

    kind: str
    seconds: float
    stop: int | None = None


@dataclass
class History:
    """A run as it really was, drawn from a seed, and the lines that it would have written.

    skew_s: how far the clock of an attempt's node may be off; overlap: every attempt begins before the one before it ended.
    """

    seed: int
    skew_s: float = 0.0
    overlap: bool = False
    lines: list[Line] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)
    stops: Counter[str] = field(default_factory=Counter)
    saved: int = 0
    now: float = NOW

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        for number in range(1, self.draw.randint(2, 7)):
            self._attempt(number)

    def spent(self, kind: str) -> float:
        """How long something took."""
        seconds = round(self.draw.uniform(0.01, 5.0), 3)
        self.parts.append(Part(kind, seconds))
        self.now += seconds
        return seconds

    def _write(self, event: str, **facts: Any) -> None:
        self.lines.append({"event": event, "attempt": self.number, **facts, "time": self.now + self.clock_s})

    def _attempt(self, number: int) -> None:
        start = self.draw.choice([self.saved, self.saved, max(self.saved - EVERY, 0)])
        again = self.lines != []
        self._known: dict[str, Any] = {}
        if again:
            self._fate(start)
        self.number, self.clock_s = number, self.draw.uniform(-self.skew_s, self.skew_s)
        early = self.draw.uniform(0, 3) if self.overlap and again else 0.0
        began, first = self.now - early, len(self.parts)
        kind = "restart" if again else "startup"
        starting = self.spent(kind) + early
        self._write("attempt", start=start, began=began + self.clock_s, **self._known)
        seconds = Counter({kind: starting + self.spent(kind)})
        self.saved = step = start
        for _ in range(self.draw.randint(0, 4 * EVERY)):
            seconds[kind if step == start else "data_wait"] += self.spent(kind if step == start else "data_wait")
            seconds["step"] += self.spent("step")
            step += 1
            if step % EVERY == 0:
                first = self._commit(step, seconds, first)
        self._ends(step, seconds, first)

    def _commit(self, step: int, seconds: Counter[str], first: int) -> int:
        seconds["validate"] += self.spent("validate")
        self._settle(first, step)
        receipts = {"0": {"count": BATCH * (step - self.saved)}}
        self._write("commit", start=self.saved, stop=step, receipts=receipts, seconds=dict(seconds))
        seconds.clear()
        first, self.saved = len(self.parts), step
        seconds["checkpoint"] += self.spent("checkpoint")
        return first

    def _settle(self, first: int, stop: int) -> None:
        for part in self.parts[first:]:
            part.stop = stop

    def _ends(self, step: int, seconds: Counter[str], first: int) -> None:
        self.how = self.draw.choice(["killed", "silent", "failed", "interrupted"])
        self.step, self.unbooked = step, self.parts[first:]
        if self.how == "interrupted" and step > self.saved:
            self.unbooked = self.parts[self._commit(step, seconds, first) :]
        if self.how in ("failed", "interrupted"):
            seconds["other"] += self.spent("restart" if self.how == "failed" else "other")
            self.reason = self.draw.choice(["SIGTERM", "preemption"]) if self.how == "interrupted" else "HungError"
            done = {"steps": self.saved, "done": step, "reason": self.reason}
            self._write("end", outcome=self.how, **done, seconds=dict(seconds))
        self.last = self.now

    def _fate(self, start: int) -> None:
        """What becomes of the attempt before, seen from the next one, and the time in between."""
        gone = [part for part in self.unbooked if part.kind not in ("startup", "restart")]
        lost_s = sum(part.seconds for part in gone)
        done = self.step
        if self.how == "killed" and self.step > self.saved:
            self._known = {"before": {"done": self.step, "time": self.now + self.clock_s, "lost_s": lost_s}}
        elif self.how in ("killed", "silent"):
            done = self.saved
        if self.how != "interrupted":
            self.lost_steps.append(max(done - start, 0))
            for part in gone:
                part.kind = "lost" if self.how == "failed" or self._known else "restart"
            if self.how != "failed" and not self._known and self.lines[-1]["event"] == "attempt":
                # Nobody knows that it ever got through its start, which is the next one's restart then.
                self._never_seen()
        else:
            self.stops[self.reason] += 1
        for part in self.parts:
            if part.stop is not None and part.stop > start and part.kind not in ("startup", "restart"):
                part.kind = "lost"
        if not self.overlap:
            self._passes()

    def _never_seen(self) -> None:
        for part in self.unbooked[1:]:
            part.kind = "restart"

    def _passes(self) -> None:
        self.spent("idle" if self.how == "interrupted" and self.reason == "SIGTERM" else "restart")

    def expected(self) -> dict[str, float]:
        """Seconds by kind up to the last line."""
        for part in self._after_the_last_line():
            self.parts.remove(part)
        if self.how == "failed":
            for part in self.unbooked:
                part.kind = "lost" if part.kind not in ("startup", "restart") else part.kind
        totals = dict.fromkeys(KINDS, 0.0)
        for part in self.parts:
            totals[part.kind] += part.seconds
        return totals

    def _after_the_last_line(self) -> list[Part]:
        if self.lines[-1]["event"] == "end":
            return []
        return self.unbooked[1:] if self.lines[-1]["event"] == "attempt" else self.unbooked


@pytest.mark.parametrize("overlap", [False, True], ids=["one at a time", "two at once"])
def test_every_second_of_the_wall_time_is_in_one_place(overlap: bool) -> None:
    hows: Counter[str] = Counter()
    for seed in range(600):
        history = History(seed, overlap=overlap)
        found, expected = goodput(history.lines), history.expected()
        hows[history.how] += 1
        assert found.seconds == pytest.approx(expected, abs=1e-4), seed
        assert found.wall_s == pytest.approx(history.lines[-1]["time"] - NOW, abs=1e-4)
        assert found.wall_s == sum(found.seconds.values())
        assert found.stops == history.stops + Counter([history.reason] if history.how == "interrupted" else [])
        lost = [failure.lost_steps for failure in found.failures]
        last = [history.step - history.saved] if history.how == "failed" else []
        assert lost == history.lost_steps + last
    assert min(hows.values()) > 50


def test_clocks_that_differ_between_nodes_leave_no_time_negative_and_none_out() -> None:
    for seed in range(600):
        one_clock, many_clocks = (goodput(History(seed, skew, overlap=True).lines) for skew in (0.0, 60.0))
        assert min(many_clocks.seconds.values()) >= 0
        assert many_clocks.wall_s == sum(many_clocks.seconds.values())
        for kind in ("step", "data_wait", "validate", "checkpoint", "lost"):
            assert many_clocks.seconds[kind] == pytest.approx(one_clock.seconds[kind], abs=1e-4)


def attempt(number: int, start: int, began: float, **facts: Any) -> Line:
    return {"event": "attempt", "attempt": number, "start": start, "began": NOW + began, "time": NOW + began + 1, **facts}


def commit(number: int, start: int, stop: int, time: float, **seconds: float) -> Line:
    receipts = {"0": {"count": BATCH * (stop - start)}}
    known = {"start": start, "stop": stop, "receipts": receipts, "seconds": seconds}
    return {"event": "commit", "attempt": number, **known, "time": NOW + time}


def killed_and_continued() -> list[Line]:
    """Ten steps of a second each, saved after four; killed after six; continued 20 s later, from four."""
    return [
        attempt(1, 0, 0.0),
        commit(1, 0, 4, 6.0, startup=2.0, step=4.0),
        attempt(2, 4, 28.0, before={"done": 6, "time": NOW + 8.0, "lost_s": 2.0}),
        commit(2, 4, 10, 37.0, restart=3.0, step=6.0),
    ]


def test_a_kill_costs_the_steps_since_the_last_checkpoint_and_the_time_until_the_next_step() -> None:
    found = goodput(killed_and_continued())
    spent = {kind: seconds for kind, seconds in found.seconds.items() if seconds}
    assert spent == {"step": 10.0, "startup": 2.0, "lost": 2.0, "restart": 23.0}
    assert found.failures == (Failure(1, UNKNOWN, lost_steps=2, lost_s=2.0, restart_s=23.0),)
    assert (found.wall_s, found.ettr, found.samples_per_s) == (37.0, 10 / 37, 80 / 37)
    assert (found.steps, found.lost_steps, found.mtbf_s) == (10, 2, 37.0)


@pytest.mark.parametrize(
    ("how", "foreseen"),
    [
        ({"outcome": "rolled_back", "reason": "bad loss"}, True),
        ({"outcome": "failed", "reason": "DataError", "foreseen": True}, True),
        ({"outcome": "failed", "reason": "RuntimeError", "foreseen": False}, False),
    ],
)
def test_only_accidents_are_reckoned_with_in_the_time_between_failures(how: dict[str, Any], foreseen: bool) -> None:
    """The run that was killed once breaks again at its end, and is continued after half a minute."""
    end = {"event": "end", "attempt": 2, "steps": 10, "done": 10, "seconds": {"other": 1.0}, "time": NOW + 38.0, **how}
    found = goodput([*killed_and_continued(), end, attempt(3, 10, 68.0)])
    assert [(failure.why, failure.foreseen) for failure in found.failures] == [(UNKNOWN, False), (how["reason"], foreseen)]
    assert len(found.accidents) == 2 - foreseen
    # 69 s in all; nobody was trying in 32 of them, if it had ended in a way that calls for somebody.
    assert found.mtbf_s == (37.0 if foreseen else 69.0 / 2)


def test_a_commit_whose_checkpoint_is_broken_is_lost_with_its_samples() -> None:
    lines = [attempt(1, 0, 0.0), commit(1, 0, 4, 4.0, step=4.0), commit(1, 4, 8, 8.0, step=4.0), attempt(2, 4, 10.0)]
    found = goodput([*lines, commit(2, 4, 8, 15.0, restart=1.0, step=4.0)])
    assert (found.seconds["step"], found.seconds["lost"], found.lost_steps) == (8.0, 4.0, 4)
    assert found.samples_per_s == 64 / 15


def test_a_node_whose_clock_is_behind_is_put_forward() -> None:
    lines = killed_and_continued()
    for line in lines[2:]:
        # Its clock says that it wrote its first line 9 s before the one before made its last step.
        line["time"] -= 30.0
    lines[2]["began"] -= 30.0
    found = goodput(lines)
    assert found.seconds["restart"] == 2.0
    assert (found.wall_s, found.seconds["lost"]) == (16.0 + found.seconds["startup"] - 2.0, 2.0)


def test_what_an_overtaken_attempt_still_enters_is_left_out() -> None:
    lines = killed_and_continued()
    assert goodput([*lines, commit(1, 6, 8, 40.0, step=2.0)]) == goodput(lines)


def test_it_is_told_in_lines_of_a_terminal() -> None:
    told = described(goodput(killed_and_continued()))
    assert max(map(len, told)) <= WIDTH
    assert told == [
        "wall time 37.0 s, goodput 27.0%, 2.2 samples/s",
        "  restart 62.2%, step 27.0%, startup 5.4%, lost 5.4%",
        "  1 failure (no word of its end: 1), 2 steps lost, no planned stops",
    ]
    assert [duration(seconds) for seconds in (0.04, 75, 3_700, 90_000)] == ["0.0 s", "1 min 15 s", "1 h 2 min", "1 d 1 h"]
