"""Checkpoints: whole or not at all, verified before use, never lost to a broken newer one."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from draf_dist.errors import DataError, GateError, StorageFullError
from draf_dist.storage import open_store
from draf_dist.training.checkpoint import MANIFEST, STATE, Checkpoints, folder_of
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import OrderState, RunState

WEIGHTS = "model.safetensors"


def state_at(step: int) -> RunState:
    order = OrderState(release="v1", seed=0, groups=64, open_samples=65_536, batch_size=8, step=step)
    return RunState(order=order, stopping=EarlyStopping(patience=3), job_sha256="0" * 64, attempt=1, world=1)


def saver(content: bytes) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(content)
        (folder / "shards").mkdir()
        (folder / "shards" / "rank0").write_bytes(content * 2)

    return save


def allow() -> None:
    """A guard that finds nothing amiss."""


@pytest.fixture
def run(tmp_path: Path) -> Checkpoints:
    return Checkpoints(open_store(str(tmp_path)), keep=2)


def commit(run: Checkpoints, *steps: int) -> None:
    for step in steps:
        run.commit(state_at(step), saver(f"weights of {step}".encode()), guard=allow)


def newest_step(run: Checkpoints, warnings: list[str] | None = None) -> int | None:
    with run.newest((warnings if warnings is not None else []).append) as found:
        return None if found is None else found[0].order.step


def test_the_newest_checkpoint_is_found_with_every_file(run: Checkpoints) -> None:
    commit(run, 10, 20)
    with run.newest(pytest.fail) as found:
        assert found is not None
        state, folder = found
        assert state == state_at(20)
        assert (folder / WEIGHTS).read_bytes() == b"weights of 20"
        assert (folder / "shards" / "rank0").read_bytes() == b"weights of 20" * 2


def test_a_run_without_checkpoints_starts_at_the_beginning(run: Checkpoints) -> None:
    assert newest_step(run) is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "flipped", "gone"])
@pytest.mark.parametrize("name", [WEIGHTS, "shards/rank0", STATE])
def test_a_broken_file_falls_back_to_the_checkpoint_before_and_is_named(
    run: Checkpoints, tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    commit(run, 10, 20)
    damage(tmp_path / folder_of(20) / name)
    warnings: list[str] = []
    assert newest_step(run, warnings) == 10
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{tmp_path}/{folder_of(20)}/{name}: expected")


def test_a_manifest_that_was_cut_short_is_a_broken_checkpoint(run: Checkpoints, tmp_path: Path) -> None:
    commit(run, 10, 20)
    truncate(tmp_path / folder_of(20) / MANIFEST)
    warnings: list[str] = []
    assert newest_step(run, warnings) == 10
    assert MANIFEST in warnings[0]


def test_a_half_written_checkpoint_is_never_taken(run: Checkpoints) -> None:
    """Killed at any moment before the manifest is there, a checkpoint does not exist: without a word."""
    commit(run, 10, 20)

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.commit(state_at(30), saver(b"half"), guard=killed)
    assert run.store.exists(f"{folder_of(30)}/{WEIGHTS}")
    warnings: list[str] = []
    assert newest_step(run, warnings) == 20
    assert not warnings


def test_rewriting_a_checkpoint_leaves_no_moment_with_an_old_manifest_over_new_files(run: Checkpoints) -> None:
    commit(run, 10, 20)

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.commit(state_at(20), saver(b"other"), guard=killed)
    warnings: list[str] = []
    assert newest_step(run, warnings) == 10
    assert not warnings


def test_if_no_checkpoint_is_good_the_run_refuses_to_start_over_by_itself(run: Checkpoints, tmp_path: Path) -> None:
    commit(run, 10, 20)
    for step in (10, 20):
        flip(tmp_path / folder_of(step) / WEIGHTS)
    with pytest.raises(DataError, match=r"expected a good checkpoint, found 2, all broken\. Start anew with --fresh"):
        newest_step(run)


def test_the_newest_and_the_best_are_kept(run: Checkpoints) -> None:
    for step in (10, 20, 30, 40, 50):
        commit(run, step)
        run.prune(best_step=20)
    assert run.steps() == [20, 40, 50]


def test_broken_checkpoints_past_the_good_one_never_push_it_out(run: Checkpoints, tmp_path: Path) -> None:
    commit(run, 10, 20, 30)
    for step in (20, 30):
        (tmp_path / folder_of(step) / WEIGHTS).write_bytes(b"rot")
    assert newest_step(run) == 10
    run.discard_past(10)
    commit(run, 12)
    run.prune(best_step=None)
    assert run.steps() == [10, 12]
    assert newest_step(run) == 12


def test_what_was_never_finished_is_removed_and_nothing_besides(run: Checkpoints, tmp_path: Path) -> None:
    commit(run, 10)
    (tmp_path / folder_of(7) / "shards").mkdir(parents=True)
    (tmp_path / folder_of(7) / "shards" / "rank0").write_bytes(b"half")
    (tmp_path / "checkpoints" / "note.txt").write_text("kept")
    run.discard_past(10)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["note.txt", "step-00000010"]
    assert newest_step(run) == 10


def test_an_attempt_that_was_replaced_writes_no_checkpoint(run: Checkpoints) -> None:
    def replaced() -> None:
        raise GateError("another attempt")

    with pytest.raises(GateError):
        run.commit(state_at(10), saver(b"old"), guard=replaced)
    assert run.steps() == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_in_force(tiny_disk: Path) -> None:
    run = Checkpoints(open_store(str(tiny_disk)), keep=2)
    run.commit(state_at(10), saver(bytes(10_000)), guard=allow)
    with pytest.raises(StorageFullError, match=r"expected room on the disk"):
        run.commit(state_at(20), saver(bytes(200_000)), guard=allow)
    assert newest_step(run) == 10
