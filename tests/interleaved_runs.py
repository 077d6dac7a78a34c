"""Attempts at one run that save, die, are believed dead and go on: a world of tests/interleaved.py."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

from interleaved import Actor, Scheduler, ViolationError

from draf_dist.errors import DrafError
from draf_dist.protocols import attempts, checkpoint
from draf_dist.protocols.attempts import AttemptRecord, SupersededError
from draf_dist.protocols.names import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointName,
    attempt_path,
    checkpoint_folder,
    checkpoint_name,
    manifest_path,
    parse_attempt,
    tensors_file,
)
from draf_dist.protocols.operations import Delete, List, Operation

Program = Generator[Operation, Any, None]
DAMAGED = b"damaged"
ANEW = "begun anew"


@dataclass(eq=False)
class View:
    """One attempt as all its ranks know it. start: the step restored, None before; step: the last that the first rank saves."""

    index: int
    record: AttemptRecord | None = None
    start: int | None = None
    step: int = 0
    dead: bool = False
    done: bool = False
    waiting: list[tuple[int, int]] = field(default_factory=list)


@dataclass(eq=False)
class Run:
    """A run of a few steps, saved at each. Its numbers are drawn when it begins."""

    random: Random
    goal: int = 0
    world: int = 0
    keep: int = 0
    starts: int = 0
    views: list[View] = field(default_factory=list)
    reported: list[CheckpointName] = field(default_factory=list)
    may_begin_anew: bool = False
    was_begun_anew: bool = False
    damaged: str = ""
    damaged_at: int = 0
    may_damage: bool = False
    is_calm: bool = False

    def begin(self, scheduler: Scheduler) -> None:
        draw = self.random.random
        self.goal, self.world, self.keep = 2 + int(3 * draw()), 1 + int(2 * draw()), 1 + int(2 * draw())
        self.starts = 1 + int(4 * draw())
        self.may_damage = self.keep > 1 and draw() < 0.3
        # The step of the lowest validation loss may be any.
        self.losses = [draw() for _ in range(self.goal + 1)]
        # Nobody saves step 0: what was drawn for it decides this.
        self.may_begin_anew = self.losses[0] < 0.2
        self.scheduler, self.store = scheduler, scheduler.store
        self._start(scheduler)

    def tick(self, scheduler: Scheduler) -> None:
        draw = scheduler.draw()
        if self.starts and draw < (0.2 if self.views[-1].dead else 0.015):
            self.starts -= 1
            self._start(scheduler)
        elif self.may_damage and draw > 0.98:
            self._damage()
        elif self.may_begin_anew and 0.9 < draw < 0.92:
            self.may_begin_anew, self.was_begun_anew = False, True
            scheduler.start("anew", self._anew(), None)

    def calm(self, scheduler: Scheduler) -> None:
        if not self.is_calm or self.views[-1].dead or self._is_past(self.views[-1]):
            self.is_calm = True
            self._start(scheduler)

    def is_over(self) -> bool:
        return self.views[-1].done and not self._is_past(self.views[-1])

    def gone(self, actor: Actor, error: DrafError | None, *, killed: bool) -> None:
        view: View | None = actor.whose
        if view is None:
            # What it did not remove is passed over like all that nobody inherits.
            return
        if killed:
            view.dead = True
        elif isinstance(error, SupersededError):
            view.dead = True
            if self._highest() <= view.record.number:
                raise ViolationError("the newest attempt was told that there is a later one")
        elif error is not None:
            raise ViolationError(f"an error that nobody caused: {error}")

    def check(self) -> None:
        """Nothing lies there that is not whole, what the run needs does, and no more."""
        last = self.views[-1].record
        valid = self._valid(last, ())
        for name in valid:
            if name.id != self.damaged:
                self._check_whole(name)
        if not valid or valid[-1].step != self.goal:
            raise ViolationError("the run has come to its end and the checkpoint of its end is not there")
        best = self._best(self.goal)
        if not any(name.step == best for name in valid) and not self._was_damaged(best):
            raise ViolationError("the best checkpoint is gone")
        if self.views[-1].start < self.goal and len(valid) > self.keep + 1:
            raise ViolationError("checkpoints that nobody needs are still there")

    def _start(self, scheduler: Scheduler) -> None:
        view = View(len(self.views))
        self.views.append(view)
        scheduler.start(f"{view.index}.0", self._first(view), view)

    def _anew(self) -> Program:
        """As --fresh: what was there goes, and the next attempt, which may come at any moment, begins at the beginning."""
        paths: list[str] = yield List(CHECKPOINTS)
        yield from attempts.begin_anew(ANEW, 0.0)
        for path in sorted(paths, key=lambda path: not path.endswith(MANIFEST)):
            yield Delete(path)

    def _first(self, view: View) -> Program:
        record = yield from attempts.take(f"token {view.index}", 0.0)
        self._check_taken(view, record)
        found = yield from checkpoint.restore(record)
        self._check_restored(view, found)
        step = view.start = view.step = 0 if found is None else checkpoint_name(found.checkpoint).step
        broken = () if found is None else tuple(found.broken)
        for rank in range(1, self.world):
            self._go_on(view, rank, step + 1)
        while step < self.goal:
            step += 1
            view.step, waiting, view.waiting = step, view.waiting, []
            for rank, next_step in waiting:
                self._go_on(view, rank, next_step)
            yield from checkpoint.put_part(CheckpointName(record.number, step).id, 0, part(view.index, step, 0))
            yield from checkpoint.commit(record, step, self.world)
            self._check_may_report(record, step)
            self.reported.append(CheckpointName(record.number, step))
            before = self._valid(record, broken)
            yield from checkpoint.prune(record, keep=self.keep, best=(self._best(step),), broken=broken)
            self._check_pruned(record, before)
        view.done = True

    def _other(self, view: View, rank: int, step: int) -> Program:
        number = view.record.number
        yield from checkpoint.put_part(CheckpointName(number, step).id, rank, part(view.index, step, rank))
        self._go_on(view, rank, step + 1)

    def _go_on(self, view: View, rank: int, step: int) -> None:
        """The next step takes all ranks: it has to wait while the first is still busy with the save before the last."""
        if view.step < step - 1:
            view.waiting.append((rank, step))
        elif step <= self.goal:
            self.scheduler.start(f"{view.index}.{rank}", self._other(view, rank, step), view)

    def _best(self, step: int) -> int:
        return min(range(1, step + 1), key=self.losses.__getitem__)

    def _highest(self) -> int:
        number = max((view.record.number for view in self.views if view.record), default=0)
        while attempt_path(number + 1) in self.store.objects:
            number += 1
        return number

    def _begun_anew(self) -> list[int]:
        """The numbers with which the run was begun anew."""
        if not self.was_begun_anew:
            return []
        token = f'"{ANEW}"'.encode()
        return [parse_attempt(path) or 0 for path, data in self.store.objects.items() if token in data]

    def _is_past(self, view: View) -> bool:
        """Whether the run was begun anew after an attempt at it had taken its number."""
        return view.record is not None and any(number > view.record.number for number in self._begun_anew())

    def _check_taken(self, view: View, record: AttemptRecord) -> None:
        view.record = record
        if any(other.record is not None and other.record.number == record.number for other in self.views if other is not view):
            raise ViolationError(f"two attempts have number {record.number}")

    def _check_restored(self, view: View, found: checkpoint.Restorable | None) -> None:
        """A restored checkpoint is whole, on the line that earlier attempts followed, and not behind what was said to count."""
        number = view.record.number
        name = None if found is None else checkpoint_name(found.checkpoint)
        step = 0 if name is None else name.step
        anew = max((each for each in self._begun_anew() if each < number), default=0)
        lost = [each for each in self.reported if anew < each.attempt < number and each.step > step and each.id != self.damaged]
        if lost:
            raise ViolationError(f"{max(lost).id} was reported and attempt {number} goes back to step {step}")
        if name is None:
            return
        if name.attempt <= anew:
            raise ViolationError(f"{name.id} was restored by {number} although the run was begun anew with {anew}")
        claimed_at = self.store.born[attempt_path(number)]
        # Damage may come after the look.
        if name.id != self.damaged or self.damaged_at < claimed_at:
            self._check_whole(name)
        for other in self.views:
            ran_between = other.start is not None and name.attempt < other.record.number < number
            if ran_between and name.id not in other.record.inherits:
                raise ViolationError(f"{name.id} was restored by {number} and not inherited by {other.record.number}")

    def _valid(self, record: AttemptRecord, broken: Sequence[str]) -> list[CheckpointName]:
        path = attempt_path(record.number)
        if path not in self.store.objects:
            raise ViolationError(f"the record of attempt {record.number} is gone")
        record = AttemptRecord.model_validate_json(self.store.objects[path])
        names = attempts.committed_in([path for path in self.store.objects if path.startswith("checkpoints/")])
        return [name for name in names if attempts.may_restore(record, name) and name.id not in broken]

    def _check_pruned(self, record: AttemptRecord, before: list[CheckpointName]) -> None:
        left = [name for name in before if manifest_path(name.id) in self.store.objects]
        if len(left) < min(self.keep, len(before)) and self._highest() == record.number:
            raise ViolationError(f"{len(left)} good checkpoints are left and {self.keep} were to be kept")

    def _check_whole(self, name: CheckpointName) -> None:
        """All its files are there, and all are of one attempt."""
        first = self.store.objects.get(f"{checkpoint_folder(name.id)}/{tensors_file(0)}", DAMAGED)
        number = next((word for word in first.split()[1:2]), b"0")
        for rank in range(self.world):
            for file, content in part(int(number), name.step, rank).items():
                if self.store.objects.get(f"{checkpoint_folder(name.id)}/{file}") != content.data:
                    raise ViolationError(f"{name.id} has its manifest and is not whole")

    def _check_may_report(self, record: AttemptRecord, step: int) -> None:
        if self._highest() > record.number:
            raise ViolationError(f"attempt {record.number} reported step {step} after a later one had begun")

    def _damage(self) -> None:
        """Breaks a file of the newest checkpoint that counts, where there is another one to fall back to."""
        anew = max(self._begun_anew(), default=0)
        there = [each for each in self.reported if each.attempt > anew and manifest_path(each.id) in self.store.objects]
        if len(there) > 1:
            self.damaged, self.damaged_at, self.may_damage = max(there).id, self.store.clock, False
            self.store.objects[f"{checkpoint_folder(self.damaged)}/{tensors_file(0)}"] = DAMAGED

    def _was_damaged(self, step: int) -> bool:
        return bool(self.damaged) and checkpoint_name(self.damaged).step == step


@cache
def part(number: int, step: int, rank: int) -> dict[str, checkpoint.Content]:
    """What a rank saves: nobody else, and no other attempt, saves the same."""
    name = f"attempt {number} step {step} rank {rank}".encode()
    files = {tensors_file(rank): checkpoint.content_of_bytes(name)}
    return files if rank else files | {"state.json": checkpoint.content_of_bytes(b"state of " + name)}
