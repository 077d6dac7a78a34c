"""Histories of several actors on one store. Who goes on, who dies, whose answer is lost is drawn from a seed at every operation.

An actor is a generator of store operations (draf_dist.protocols). At its turn the operation that it waits for is carried out on a
store in memory, which is as consistent as S3, and it goes on to the next. Or it dies before or after its effect; or the answer is
lost, and at its next turn the same operation is made again, whatever others did in between.
"""

import hashlib
import random
import re
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from draf_dist.errors import DrafError
from draf_dist.protocols.operations import (
    Create,
    Delete,
    FileRecord,
    Inspect,
    List,
    Operation,
    Read,
    ReadWithEtag,
    Size,
    Swap,
    Wait,
    Write,
)

# Operations after which who makes no progress makes none at all.
PATIENCE = 3000
# How readily an actor takes its turn: some are a hundred times slower than others.
PACES = (1.0, 1.0, 1.0, 0.3, 0.1, 0.02)
TRIES = 4


class ViolationError(AssertionError):
    """Something happened that must not."""


class MemoryStore:
    """Whole objects by path, with create-only, compare-and-swap by content, and listings that are never behind."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.clock = 0
        # When each path was first written.
        self.born: dict[str, int] = {}
        self._does: dict[type, Callable[[Any], Any]] = {
            Read: lambda asked: self.objects.get(asked.path),
            ReadWithEtag: lambda asked: (data, data.hex()) if (data := self.objects.get(asked.path)) is not None else None,
            Inspect: lambda asked: None if (data := self.objects.get(asked.path)) is None else record_of(data),
            Size: lambda asked: None if (data := self.objects.get(asked.path)) is None else len(data),
            List: self._list,
            Create: lambda asked: asked.path not in self.objects and self._write(asked),
            Swap: lambda asked: asked.path in self.objects and self.objects[asked.path].hex() == asked.etag and self._write(asked),
            Write: self._write,
            Delete: lambda asked: self.objects.pop(asked.path, None) and None,
            Wait: lambda asked: None,
        }

    def perform(self, operation: Operation) -> Any:
        """Its result."""
        self.clock += 1
        return self._does[type(operation)](operation)

    def _write(self, asked: Write | Create | Swap) -> bool:
        self.objects[asked.path] = asked.data
        self.born.setdefault(asked.path, self.clock)
        return True

    def _list(self, asked: List) -> list[str]:
        folder = f"{asked.prefix}/"
        return sorted([path for path in self.objects if path.startswith(folder)])


_RECORDS: dict[bytes, FileRecord] = {}


def record_of(data: bytes) -> FileRecord:
    """Size and sha256; contents recur in many histories."""
    if data not in _RECORDS:
        if len(_RECORDS) > 4096:
            _RECORDS.clear()
        _RECORDS[data] = FileRecord(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return _RECORDS[data]


@dataclass(eq=False, slots=True)
class Actor:
    """One process. pending: the operation that it waits for; whose: what the world knows it by."""

    name: str
    steps: Generator[Operation, Any, Any]
    whose: Any
    pace: float
    pending: Operation


class World(Protocol):
    """What the actors do, and what must hold."""

    def begin(self, scheduler: "Scheduler") -> None:
        """Starts the first actors."""
        ...

    def tick(self, scheduler: "Scheduler") -> None:
        """After every turn while things go wrong: may start actors, and may break something."""
        ...

    def calm(self, scheduler: "Scheduler") -> None:
        """Before every turn once nothing goes wrong any more: sees to it that someone is there who gets to the end."""
        ...

    def is_over(self) -> bool:
        """Whether they have got there."""
        ...

    def gone(self, actor: Actor, error: DrafError | None, *, killed: bool) -> None:
        """An actor has ended, or was killed."""
        ...

    def check(self) -> None:
        """At the end of the history."""
        ...


class Scheduler:
    """One history."""

    def __init__(self, seed: int, *, trace: deque[str] | None = None) -> None:
        self.random = random.Random(seed)
        self.draw = self.random.random
        self.store = MemoryStore()
        self.actors: list[Actor] = []
        self._trace = trace
        self._death, self._loss = self.random.choice((0.0, 0.005, 0.02, 0.05)), self.random.choice((0.0, 0.02, 0.1))

    def start(self, name: str, steps: Generator[Operation, Any, Any], whose: Any) -> Actor:
        """Lets an actor begin; it gets its turns from now on."""
        pace = PACES[int(self.draw() * len(PACES))]
        actor = Actor(name, steps, whose, pace, next(steps))
        self.actors.append(actor)
        return actor

    def run(self, world: World) -> None:
        """The whole history: so many turns in which things go wrong, and then as many as are needed."""
        world.begin(self)
        for _ in range(int(20 + 180 * self.draw())):
            if self.actors:
                self._turn(world)
            world.tick(self)
        self._death = self._loss = 0.0
        for actor in self.actors:
            actor.pace = max(actor.pace, 0.3)
        for _ in range(PATIENCE):
            world.calm(self)
            if world.is_over():
                world.check()
                return
            self._turn(world)
        raise ViolationError("no progress although nothing goes wrong any more")

    def _turn(self, world: World) -> None:
        draw, actors = self.draw, self.actors
        actor = actors[int(draw() * len(actors))]
        for _ in range(TRIES):
            if actor.pace == 1.0 or draw() < actor.pace:
                break
            actor = actors[int(draw() * len(actors))]
        luck = draw()
        if luck < self._death:
            self._kill(world, actor, "dies before")
            return
        answer = self.store.perform(actor.pending)
        if self._trace is not None:
            self._trace.append(f"{self.store.clock:4d} {actor.name:12s} {str(actor.pending)[:120]} -> {str(answer)[:160]}")
        if luck < 2 * self._death:
            self._kill(world, actor, "dies after")
        elif luck < 2 * self._death + self._loss:
            self._note(actor, "is not told")
        else:
            self._tell(world, actor, answer)

    def _tell(self, world: World, actor: Actor, answer: Any) -> None:
        try:
            actor.pending = actor.steps.send(answer)
        except StopIteration:
            self.actors.remove(actor)
            self._note(actor, "is done")
            world.gone(actor, None, killed=False)
        except DrafError as error:
            self.actors.remove(actor)
            self._note(actor, f"stops: {error}")
            world.gone(actor, error, killed=False)

    def _kill(self, world: World, actor: Actor, how: str) -> None:
        self._note(actor, f"{how} {actor.pending}")
        self.actors.remove(actor)
        actor.steps.close()
        world.gone(actor, None, killed=True)

    def _note(self, actor: Actor, what: str) -> None:
        if self._trace is not None:
            self._trace.append(f"     {actor.name:12s} {what}")


def histories(make: Callable[[random.Random], World], seeds: range) -> int:
    """Runs one history a seed; returns the operations of all.

    Raises:
        ViolationError: with the seed and the last operations of the history in which something happened that must not.
    """
    operations = 0
    for seed in seeds:
        scheduler = Scheduler(seed)
        try:
            scheduler.run(make(scheduler.random))
        except ViolationError as violation:
            raise ViolationError(f"seed {seed}: {violation}\n" + "\n".join(told(make, seed))) from violation
        operations += scheduler.store.clock
    return operations


def caught_after(make: Callable[[random.Random], World], says: str, most: int) -> int:
    """How many histories it takes until something happens that must not, of the kind that `says` matches; 0: more than `most`."""
    for seed in range(most):
        scheduler = Scheduler(seed)
        try:
            scheduler.run(make(scheduler.random))
        except ViolationError as violation:
            if re.search(says, str(violation)):
                return seed + 1
    return 0


def told(make: Callable[[random.Random], World], seed: int) -> list[str]:
    """The last operations of the history of a seed."""
    trace: deque[str] = deque(maxlen=80)
    scheduler = Scheduler(seed, trace=trace)
    with suppress(ViolationError):
        scheduler.run(make(scheduler.random))
    return list(trace)


def alike(random: random.Random, one: Callable[[Operation], Any], other: Callable[[Operation], Any], num: int) -> int:
    """Asks two stores for the same operations, drawn at random; returns how many of them changed something.

    Raises:
        AssertionError: they answered differently.
    """
    tags: dict[str, tuple[str, str]] = {}
    changes = 0
    for _ in range(num):
        path, data = f"{random.choice('ab')}/{random.choice('cd')}/{random.choice('ef')}", random.choice((b"1", b"2", b"33"))
        kind = random.choice((Read, ReadWithEtag, Inspect, Size, List, Create, Swap, Swap, Write, Delete))
        if kind is ReadWithEtag:
            found, same = one(ReadWithEtag(path)), other(ReadWithEtag(path))
            assert (found and found[0]) == (same and same[0]), path
            if found:
                tags[path] = found[1], same[1]
        elif kind is Swap:
            ours, theirs = tags.get(path, ("00", "00"))
            swapped = one(Swap(path, data, ours))
            assert swapped == other(Swap(path, data, theirs)), path
            changes += swapped
        else:
            folder = random.choice(("a", "b", "a/c"))
            asked = List(folder) if kind is List else kind(path, data) if kind in (Create, Write) else kind(path)
            answers = one(asked), other(asked)
            assert kind is Write or answers[0] == answers[1], f"{asked}: {answers}"
            changes += kind in (Write, Delete) or (kind is Create and answers[0])
    return changes
