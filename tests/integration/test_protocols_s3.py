"""The protocols on real S3: threads that take attempts, save, die and are not told; the rules of the histories hold here too."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

import pytest
from conftest import S3
from interleaved import MemoryStore, alike
from interleaved_moves import HEAD, deliveries_of, release_of
from interleaved_runs import part

from draf_dist.protocols import publish
from draf_dist.protocols.attempts import AttemptRecord, SupersededError, numbers, take, valid_checkpoints
from draf_dist.protocols.checkpoint import commit, prune, put_part, restore
from draf_dist.protocols.names import CheckpointName, checkpoint_folder, checkpoint_name
from draf_dist.protocols.operations import Operation, ReadWithEtag, Steps, Wait, drive, performed, run_on
from draf_dist.storage import Store, open_store

Result = TypeVar("Result")
GOAL, WORLD, KEEP, WORKERS = 4, 2, 2, 3


class DiedError(Exception):
    """A worker ended between two operations."""


@dataclass
class Line:
    """A worker's way to the store: now and then it dies, or an answer is lost and the operation is made again."""

    store: Store
    random: Random
    death: float
    loss: float

    def run(self, steps: Steps[Result]) -> Result:
        return drive(steps, self._perform)

    def _perform(self, operation: Operation) -> Any:
        luck = self.random.random()
        if luck < self.death:
            raise DiedError
        if isinstance(operation, Wait):
            return None
        answer = performed(self.store, operation)
        if luck < 2 * self.death:
            raise DiedError
        return performed(self.store, operation) if luck > 1 - self.loss else answer


@dataclass
class Run:
    """What the workers saw; appending to a list is atomic."""

    store: Store
    taken: list[AttemptRecord] = field(default_factory=list)
    restored: list[tuple[AttemptRecord, int]] = field(default_factory=list)
    reported: list[CheckpointName] = field(default_factory=list)

    def attempt(self, line: Line, token: str) -> None:
        record = line.run(take(token, 0.0))
        self.taken.append(record)
        found = line.run(restore(record))
        start = 0 if found is None else found.manifest.step
        self.restored.append((record, start))
        for step in range(start + 1, GOAL + 1):
            name = CheckpointName(record.number, step)
            for rank in range(WORLD):
                line.run(put_part(name.id, rank, part(record.number, step, rank)))
            line.run(commit(record, step, WORLD))
            self.reported.append(name)
            line.run(prune(record, keep=KEEP, best=(1,)))


def together(act: Callable[[int], None]) -> None:
    """Runs the workers at once."""
    failures: list[BaseException] = []

    def guarded(worker: int) -> None:
        try:
            act(worker)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(worker,)) for worker in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.fixture
def store(s3: S3) -> Store:
    return open_store(f"{s3.url}/p")


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_attempts_that_run_at_once_lose_nothing_that_was_reported(store: Store, seed: int) -> None:
    run = Run(store)

    def work(worker: int) -> None:
        random = Random(seed + worker)
        for again in range(3):
            try:
                run.attempt(Line(store, random, death=0.01, loss=0.1), f"{worker}.{again}")
            except (DiedError, SupersededError):
                continue

    together(work)
    run.attempt(Line(store, Random(9), death=0, loss=0.1), "last")
    assert len({record.number for record in run.taken}) == len(run.taken) > WORKERS
    for record, step in run.restored:
        assert step >= max((name.step for name in run.reported if name.attempt < record.number), default=0)
    valid = run_on(store, valid_checkpoints())
    assert checkpoint_name(valid[-1]).step == GOAL
    assert {1, GOAL} <= {checkpoint_name(each).step for each in valid}
    assert run_on(store, numbers()) == list(range(1, max(record.number for record in run.taken) + 1))
    for name in map(checkpoint_name, valid):
        for rank in range(WORLD):
            for file, content in part(name.attempt, name.step, rank).items():
                assert store.read(f"{checkpoint_folder(name.id)}/{file}") == content.data


def test_releases_that_are_published_at_once_follow_one_another(store: Store) -> None:
    heads: list[tuple[int, ...]] = []

    def work(delivery: int) -> None:
        line = Line(store, Random(delivery), death=0, loss=0.2)
        while True:
            found = performed(store, ReadWithEtag(HEAD))
            taken = deliveries_of(found and found[0])
            if delivery in taken:
                return
            files, last, head = release_of((*taken, delivery))
            line.run(publish.write_release(files, last, head))
            if line.run(publish.move_head(HEAD, head, found and found[1])):
                heads.append((*taken, delivery))
                return

    together(work)
    final = deliveries_of(store.read(HEAD))
    assert sorted(final) == list(range(WORKERS))
    assert all(final[: len(head)] == head for head in heads)
    assert is_complete(store, final)


def is_complete(store: Store, deliveries: Sequence[int]) -> bool:
    files, last, _ = release_of(tuple(deliveries))
    return {*files, last} <= set(store.list("releases"))


def test_the_store_of_the_histories_answers_as_s3(store: Store) -> None:
    assert alike(Random(2), MemoryStore().perform, lambda operation: performed(store, operation), 300) > 50
