"""Checkpoints: whole or not at all, saved behind training, verified before use, never lost to a broken newer one."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from small_disk import small_disk
from torch import Tensor

from draf_dist.errors import DataError, GateError, StorageFullError, UnreachableError
from draf_dist.protocols.names import MANIFEST, STATE, CheckpointName, checkpoint_folder, part_file, tensors_file
from draf_dist.storage import open_store
from draf_dist.training import saving
from draf_dist.training.checkpoint import Checkpoints
from draf_dist.training.fragments import Fragment, WholeTensors, shared_out, whole
from draf_dist.training.restoring import Restored, restore
from draf_dist.training.run_folder import Fence
from draf_dist.training.saving import Committer, Saver
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import OrderState, RunState
from draf_dist.training.torch_engine import OneProcess

SIZE = 1000


@dataclass
class Shared:
    """Files of one rank of several that all hold the same weights."""

    rank: int
    world: int
    weights: Tensor = field(default_factory=lambda: torch.zeros(SIZE))

    def fragments(self) -> list[Fragment]:
        return shared_out([whole("weight", "w", self.weights), whole("step", "w", torch.tensor(1.0))], self.rank, self.world)

    def load(self, state: WholeTensors) -> None:
        self.weights = state["weight/w"]


@dataclass
class Attempt:
    """One attempt of all ranks at a run, each with its own saver."""

    folder: Path
    world: int = 2
    keep: int = 2
    keep_best: int = 1
    broken: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        store = open_store(str(self.folder))
        self.checkpoints = Checkpoints(store, self.keep, self.keep_best)
        self.fence = Fence.take(store)
        self.files = [Shared(rank, self.world) for rank in range(self.world)]
        committer = Committer(self.checkpoints, self.fence.attempt, self.world, self.broken)
        self.savers = [Saver(self.checkpoints, files, files.rank, committer if files.rank == 0 else None) for files in self.files]

    def begin(self, step: int, score: float | None = None, ranks: int | None = None) -> None:
        """Saves what stands for the state at a step, and does not wait."""
        for files, saver in list(zip(self.files, self.savers, strict=True))[:ranks]:
            files.weights.fill_(step)
            saver.save(state_at(step, self.fence.attempt.number, score))

    def save(self, *steps: int, scores: tuple[float, ...] = ()) -> None:
        for number, step in enumerate(steps):
            self.begin(step, scores[number] if scores else None)
            for saver in self.savers:
                saver.wait()

    def path(self, step: int, name: str) -> Path:
        return self.folder / checkpoint_folder(CheckpointName(self.fence.attempt.number, step).id) / name


def state_at(step: int, attempt: int, score: float | None = None) -> RunState:
    order = OrderState(release="v1", seed=0, groups=64, open_samples=65_536, batch_size=8, step=step)
    stopping = EarlyStopping(patience=3)
    return RunState(order=order, stopping=stopping, score=score, job_sha256="0" * 64, attempt=attempt, world=1)


def newest(folder: Path, warnings: list[str] | None = None) -> Restored:
    """As the next attempt would find it."""
    checkpoints = Checkpoints(open_store(str(folder)), keep=2)
    return restore(checkpoints, checkpoints.ids(), OneProcess(), (warnings if warnings is not None else []).append)


def newest_step(folder: Path, warnings: list[str] | None = None) -> int | None:
    found = newest(folder, warnings).checkpoint
    if found is None:
        return None
    assert torch.equal(found.tensors["weight/w"], torch.full((SIZE,), float(found.state.order.step)))
    return found.state.order.step


def test_the_newest_checkpoint_is_found_whole(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, world=3)
    attempt.save(10, 20)
    assert newest_step(tmp_path) == 20
    found = newest(tmp_path).checkpoint
    assert found is not None
    assert found.state == state_at(20, 1)
    names = {path.name for path in attempt.path(20, MANIFEST).parent.iterdir()}
    assert names == {MANIFEST, STATE, *(name(rank) for rank in range(3) for name in (part_file, tensors_file))}


def test_a_run_without_checkpoints_starts_at_the_beginning(tmp_path: Path) -> None:
    assert newest_step(tmp_path) is None


def test_the_books_come_before_anything_of_the_checkpoint(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, world=1)
    seen: list[list[str]] = []
    attempt.savers[0].save(state_at(10, 1), first=lambda: seen.append(attempt.checkpoints.store.list("checkpoints")))
    attempt.savers[0].wait()
    assert seen == [[]]
    assert newest(tmp_path).checkpoint is not None


def test_a_report_says_how_long_the_books_took(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, world=1)
    attempt.savers[0].save(state_at(10, 1), first=lambda: time.sleep(0.1))
    attempt.savers[0].wait()
    (report,) = attempt.savers[0].settled()
    assert report.books_s >= 0.1


def test_without_the_books_there_is_no_checkpoint(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, world=1)

    def refused() -> None:
        raise UnreachableError("no store")

    attempt.savers[0].save(state_at(10, 1), first=refused)
    with pytest.raises(UnreachableError):
        attempt.savers[0].wait()
    assert newest(tmp_path).checkpoint is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "flipped", "gone"])
@pytest.mark.parametrize("name", [tensors_file(0), tensors_file(1), STATE])
def test_a_broken_file_falls_back_to_the_checkpoint_before_and_is_named(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    attempt = Attempt(tmp_path)
    attempt.save(10, 20)
    damage(attempt.path(20, name))
    warnings: list[str] = []
    assert newest_step(tmp_path, warnings) == 10
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{attempt.path(20, name)}: expected")


def test_a_manifest_that_was_cut_short_is_a_broken_checkpoint(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    attempt.save(10, 20)
    truncate(attempt.path(20, MANIFEST))
    warnings: list[str] = []
    assert newest_step(tmp_path, warnings) == 10
    assert MANIFEST in warnings[0]


def test_without_the_part_of_every_rank_there_is_no_checkpoint(tmp_path: Path) -> None:
    """The first rank waits for the others; if they never come it names them."""
    attempt = Attempt(tmp_path, world=3)
    attempt.save(10)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(saving, "PARTS_TIMEOUT_S", 0.2)
        attempt.begin(20, ranks=2)
        attempt.savers[1].wait()
        with pytest.raises(UnreachableError, match=r"a0000001: expected the parts of all ranks, found nothing of rank 2 after"):
            attempt.savers[0].wait()
    assert attempt.path(20, tensors_file(1)).exists()
    warnings: list[str] = []
    assert newest_step(tmp_path, warnings) == 10
    assert not warnings


def test_if_no_checkpoint_is_good_the_run_refuses_to_start_over_by_itself(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    attempt.save(10, 20)
    for step in (10, 20):
        flip(attempt.path(step, tensors_file(1)))
    with pytest.raises(DataError, match=r"expected a good checkpoint, found 2, all broken\. Start anew with --fresh"):
        newest_step(tmp_path)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, keep=2, keep_best=2)
    attempt.save(10, 20, 30, 40, 50, 60, scores=(0.5, 0.1, 0.3, 0.2, 0.4, 0.9))
    assert attempt.checkpoints.steps() == [20, 40, 50, 60]


def test_of_two_with_the_same_score_the_earlier_one_is_the_best(tmp_path: Path) -> None:
    """As early stopping has it: that is the one which is exported."""
    attempt = Attempt(tmp_path, keep=1)
    attempt.save(10, 20, 30, scores=(0.5, 0.5, 0.9))
    assert attempt.checkpoints.steps() == [10, 30]


def test_the_next_attempt_keeps_the_best_of_the_one_before(tmp_path: Path) -> None:
    Attempt(tmp_path, keep=1).save(10, 20, scores=(0.1, 0.5))
    attempt = Attempt(tmp_path, keep=1)
    attempt.save(30, 40, scores=(0.3, 0.2))
    assert attempt.checkpoints.steps() == [10, 40]


def test_broken_checkpoints_never_push_a_good_one_out(tmp_path: Path) -> None:
    old = Attempt(tmp_path, keep=3)
    old.save(10, 20, 30, scores=(0.3, 0.1, 0.2))
    for step in (20, 30):
        old.path(step, tensors_file(0)).write_bytes(b"rot")
    found = newest(tmp_path)
    assert set(found.broken) == {CheckpointName(1, 20).id, CheckpointName(1, 30).id}
    attempt = Attempt(tmp_path, keep=2, broken=found.broken)
    attempt.save(12)
    assert attempt.checkpoints.steps() == [10, 12]
    assert newest_step(tmp_path) == 12


def test_what_was_never_finished_is_removed_and_nothing_besides(tmp_path: Path) -> None:
    Attempt(tmp_path).save(10)
    half = tmp_path / checkpoint_folder(CheckpointName(1, 11).id) / tensors_file(0)
    half.parent.mkdir()
    half.write_bytes(b"half")
    (tmp_path / "checkpoints" / "note.txt").write_text("kept")
    Attempt(tmp_path).save(12)
    expected = ["note.txt", CheckpointName(1, 10).id, CheckpointName(2, 12).id]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == expected


def test_an_attempt_that_was_replaced_writes_nothing_that_counts(tmp_path: Path) -> None:
    """Neither a checkpoint, nor does it remove what its successor goes on from."""
    old = Attempt(tmp_path, keep=1)
    old.save(10)
    new = Attempt(tmp_path, keep=1)
    old.begin(20)
    with pytest.raises(GateError, match="a later one"):
        old.savers[0].wait()
    assert new.checkpoints.steps() == [10]
    new.save(15)
    assert newest_step(tmp_path) == 15


def test_checkpoints_of_an_earlier_version_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000010" / MANIFEST).write_text("{}")
    # Also where an attempt has looked before.
    for _ in range(2):
        with pytest.raises(DataError, match="earlier version"):
            newest(tmp_path)
        Fence.take(open_store(str(tmp_path)))


def test_a_full_disk_leaves_the_last_checkpoint_in_force_and_stops_training(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as folder:
        attempt = Attempt(folder, world=1)
        attempt.save(10)
        attempt.files[0].weights = torch.zeros(500_000)
        attempt.begin(20)
        with pytest.raises(StorageFullError, match=r"expected room on the disk"):
            attempt.savers[0].wait()
        assert newest_step(folder) == 10


@dataclass
class Held:
    """A store's writes of tensors wait until they are let go."""

    monkeypatch: pytest.MonkeyPatch
    go: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        store_type = type(open_store("/"))
        write = store_type.write

        def held(store: Any, path: str, data: bytes | memoryview) -> None:
            if path.endswith(tensors_file(0)):
                assert self.go.wait(30)
            write(store, path, data)

        self.monkeypatch.setattr(store_type, "write", held)

    def let_go(self, after_s: float) -> None:
        threading.Timer(after_s, self.go.set).start()


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Attempt(tmp_path, world=1)
    held, saver = Held(monkeypatch), attempt.savers[0]
    attempt.begin(10)
    assert saver.settled() == []
    # What training does meanwhile is not in it.
    attempt.files[0].weights.fill_(11)
    held.let_go(0.3)
    began = time.monotonic()
    attempt.begin(20)
    assert time.monotonic() - began > 0.2
    assert [report.step for report in saver.settled()] == [10]
    assert torch.equal(attempt.checkpoints.at(10).tensors["weight/w"], torch.full((SIZE,), 10.0))
    saver.wait()
    (report,) = saver.settled()
    assert report.step == 20
    assert report.size_bytes == sum(attempt.path(20, name).stat().st_size for name in (tensors_file(0), STATE))


def test_leaving_waits_for_the_checkpoint_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt, held = Attempt(tmp_path, world=1), Held(monkeypatch)
    with attempt.savers[0]:
        attempt.begin(10)
        held.let_go(0.2)
    assert newest_step(tmp_path) == 10


def save_and_fail(attempt: Attempt) -> None:
    """The first rank fails right after it has begun to save step 10."""
    with attempt.savers[0]:
        attempt.begin(10, ranks=1)
        raise ZeroDivisionError


def test_a_run_that_failed_keeps_the_checkpoint_that_was_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt, held = Attempt(tmp_path, world=1), Held(monkeypatch)
    held.let_go(0.2)
    with pytest.raises(ZeroDivisionError):
        save_and_fail(attempt)
    assert newest_step(tmp_path) == 10


def test_a_rank_that_failed_does_not_wait_long_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "GRACE_S", 0.1)
    attempt = Attempt(tmp_path)
    with pytest.raises(ZeroDivisionError):
        save_and_fail(attempt)
    with pytest.raises(UnreachableError, match="nothing of rank 1"):
        attempt.savers[0].wait()


def test_a_checkpoint_that_another_rank_cannot_read_is_used_by_none(tmp_path: Path) -> None:
    """All ranks must go on from the same step."""
    on_the_other_rank = iter((0.0, 1.0))

    class TwoRanks(OneProcess):
        def reduce(self, values: Tensor) -> Tensor:
            return values + next(on_the_other_rank)

    Attempt(tmp_path, world=1).save(10, 20)
    checkpoints, warnings = Checkpoints(open_store(str(tmp_path)), keep=2), []
    found = restore(checkpoints, checkpoints.ids(), TwoRanks(world=2), warnings.append)
    assert found.checkpoint is not None
    assert found.checkpoint.state.order.step == 10
    assert "another rank" in warnings[0]
