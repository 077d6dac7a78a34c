"""Releases of one data set and promotions of one model by several processes at once: worlds of tests/interleaved.py."""

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any

from interleaved import Actor, Scheduler, ViolationError

from draf_dist.errors import DrafError, GateError
from draf_dist.protocols import promote, publish
from draf_dist.protocols.operations import Operation, ReadWithEtag

Program = Generator[Operation, Any, None]
HEAD = "HEAD.json"
HISTORY, ALIAS = "history", "champion"


@dataclass(eq=False)
class DataSet:
    """Deliveries that are each taken in by one or two processes at once. A release is named by the deliveries in it, in order."""

    random: Random
    num_deliveries: int = 0
    starts: list[int] = field(default_factory=list)
    head: bytes | None = None
    published: set[int] = field(default_factory=set)
    working: list[int] = field(default_factory=list)

    def begin(self, scheduler: Scheduler) -> None:
        self.store = scheduler.store
        self.num_deliveries = 2 + int(3 * self.random.random())
        self.starts = [int(self.num_deliveries * self.random.random()) for _ in range(2)]
        for delivery in range(self.num_deliveries):
            self._start(scheduler, delivery)

    def tick(self, scheduler: Scheduler) -> None:
        self._look()
        if self.starts and scheduler.draw() < 0.03:
            self._start(scheduler, self.starts.pop())

    def calm(self, scheduler: Scheduler) -> None:
        self._look()
        for delivery in range(self.num_deliveries):
            if delivery not in self.published and delivery not in self.working:
                self._start(scheduler, delivery)

    def is_over(self) -> bool:
        return len(self.published) == self.num_deliveries

    def gone(self, actor: Actor, error: DrafError | None, *, killed: bool) -> None:
        self.working.remove(actor.whose)
        if error is not None:
            raise ViolationError(f"an error that nobody caused: {error}")

    def check(self) -> None:
        self._look()
        taken = deliveries_of(self.head)
        if sorted(taken) != sorted(self.published):
            raise ViolationError(f"{sorted(self.published)} were published and the newest release has {taken}")
        for path in self.store.objects:
            if path.endswith("/release.json"):
                self._check_complete(path)

    def _start(self, scheduler: Scheduler, delivery: int) -> None:
        self.working.append(delivery)
        scheduler.start(f"delivery {delivery}", self._ingest(delivery), delivery)

    def _ingest(self, delivery: int) -> Program:
        while True:
            found = yield ReadWithEtag(HEAD)
            before, etag = (None, None) if found is None else found
            taken = deliveries_of(before)
            if delivery in taken:
                break
            files, last, head = release_of((*taken, delivery))
            yield from publish.write_release(files, last, head)
            if (yield from publish.move_head(HEAD, head, etag)):
                break
            if self.store.objects[HEAD] == head:
                raise ViolationError("one whose release is the newest was told that another's is")
        if delivery not in deliveries_of(self.store.objects.get(HEAD)):
            raise ViolationError(f"delivery {delivery} was published and is not in the newest release")
        self.published.add(delivery)

    def _look(self) -> None:
        """Whatever HEAD.json comes to hold follows what it held, and is complete."""
        now = self.store.objects.get(HEAD)
        if now == self.head:
            return
        before, after = deliveries_of(self.head), deliveries_of(now)
        if after[:-1] != before:
            raise ViolationError(f"the release of {after} replaced that of {before}, on which it does not build")
        if len(set(after)) != len(after):
            raise ViolationError(f"a delivery is twice in {after}")
        self._check_complete(release_of(after)[1])
        self.head = now

    def _check_complete(self, last: str) -> None:
        files, _, data = release_of(deliveries_of(self.store.objects.get(last)))
        if self.store.objects.get(last) != data or any(self.store.objects.get(path) != content for path, content in files.items()):
            raise ViolationError(f"{last} stands for a release that is not complete")


def release_of(deliveries: tuple[int, ...]) -> tuple[dict[str, bytes], str, bytes]:
    """Its files, the path of its last one, and what that and HEAD.json hold."""
    version = "-".join(map(str, deliveries))
    files = {f"releases/{version}/{name}": f"{name} of {version}".encode() for name in ("schema", "subjects")}
    return files, f"releases/{version}/release.json", json.dumps(deliveries).encode()


def deliveries_of(head: bytes | None) -> tuple[int, ...]:
    return () if head is None else tuple(json.loads(head))


@dataclass(eq=False)
class Registry:
    """Versions of a model that are each promoted against the champion that they were judged against, and roll-backs."""

    random: Random
    starts: int = 0
    seen: list[bytes] = field(default_factory=list)
    reported: list[bytes] = field(default_factory=list)
    num_actors: int = 0
    is_calm: bool = False

    def begin(self, scheduler: Scheduler) -> None:
        self.store = scheduler.store
        self.starts = 2 + int(3 * self.random.random())
        for _ in range(1 + int(2 * self.random.random())):
            self._start(scheduler)

    def tick(self, scheduler: Scheduler) -> None:
        self._look()
        if self.starts and scheduler.draw() < 0.06:
            self.starts -= 1
            self._start(scheduler)

    def calm(self, scheduler: Scheduler) -> None:
        self._look()
        if not self.is_calm:
            self.is_calm = True
            self._start(scheduler)

    def is_over(self) -> bool:
        return not self.scheduler.actors

    def gone(self, actor: Actor, error: DrafError | None, *, killed: bool) -> None:
        if error is not None and not isinstance(error, GateError):
            raise ViolationError(f"an error that nobody caused: {error}")

    def check(self) -> None:
        self._look()
        for entry in self.reported:
            if self.seen.count(entry) != 1:
                raise ViolationError(f"{entry!r} was reported and is {self.seen.count(entry)} times in the history")
        if len(set(self.seen)) != len(self.seen):
            raise ViolationError("one promotion is in the history twice")
        if self.store.objects[ALIAS] != alias_after(self.seen):
            raise ViolationError("the alias names another version than the history")

    def _start(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.num_actors += 1
        name = f"version {self.num_actors}"
        roll_back = self.random.random() < 0.2
        scheduler.start(name, self._roll_back(name) if roll_back else self._promote(name, self.num_actors), None)

    def _promote(self, token: str, version: int) -> Program:
        while True:
            judged_against = champion_of((yield from promote.read_history(HISTORY)))

            def entry_after(entries: Sequence[bytes], against: int = judged_against) -> bytes | None:
                champion = champion_of(entries)
                if champion != against:
                    raise GateError("judged against another champion")
                return None if champion == version else encoded("promote", version, champion, token)

            try:
                entry = yield from promote.append(HISTORY, entry_after)
            except GateError:
                continue
            break
        if entry is not None:
            self.reported.append(entry)
        yield from promote.follow(HISTORY, ALIAS, alias_after)

    def _roll_back(self, token: str) -> Program:
        def entry_after(entries: Sequence[bytes]) -> bytes | None:
            line = line_of(entries)
            return encoded("rollback", line[-2], line[-1], token) if len(line) > 1 else None

        entry = yield from promote.append(HISTORY, entry_after)
        if entry is not None:
            self.reported.append(entry)
        yield from promote.follow(HISTORY, ALIAS, alias_after)

    def _look(self) -> None:
        """Entries are added at the end, one by one, each following the champion that was; none ever changes."""
        paths = [path for path in self.store.objects if path.startswith(f"{HISTORY}/")]
        for number, entry in enumerate(self.seen):
            if self.store.objects.get(promote.entry_path(HISTORY, number)) != entry:
                raise ViolationError(f"entry {number} of the history has changed")
        while len(self.seen) < len(paths):
            entry = self.store.objects.get(promote.entry_path(HISTORY, len(self.seen)))
            if entry is None:
                raise ViolationError(f"entry {len(self.seen)} of the history is missing")
            if decoded(entry)["previous"] != champion_of(self.seen):
                raise ViolationError("a champion was replaced by one that was not judged against it")
            self.seen.append(entry)


def encoded(action: str, version: int, previous: int, token: str) -> bytes:
    return json.dumps({"action": action, "version": version, "previous": previous, "token": token}).encode()


@lru_cache(4096)
def decoded(entry: bytes) -> dict[str, Any]:
    return json.loads(entry)


def line_of(entries: Sequence[bytes]) -> list[int]:
    """The champion last, after those that a roll-back returns to."""
    line: list[int] = []
    for entry in map(decoded, entries):
        if entry["action"] == "promote":
            line.append(entry["version"])
        else:
            line.pop()
    return line


def champion_of(entries: Sequence[bytes]) -> int:
    return (line_of(entries) or [0])[-1]


def alias_after(entries: Sequence[bytes]) -> bytes:
    return str(champion_of(entries)).encode()
