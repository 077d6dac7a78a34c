"""The protocols on a real folder, one call after the other. What happens when calls meet: test_protocols_histories.py."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from interleaved import MemoryStore, alike

from draf_dist.data.parent import Parent
from draf_dist.data.publish import OvertakenError, move_head
from draf_dist.data.release import HEAD
from draf_dist.errors import DataError
from draf_dist.protocols.attempts import (
    AttemptRecord,
    SupersededError,
    begin_anew,
    check_newest,
    is_newest,
    numbers,
    of_step,
    read_attempt,
    take,
    valid_checkpoints,
)
from draf_dist.protocols.checkpoint import commit, content_of_bytes, content_of_file, newest_good, prune, put_part, restore
from draf_dist.protocols.names import CheckpointName, attempt_path, parse_checkpoint
from draf_dist.protocols.operations import BLOCK_BYTES, FileRecord, Write, drive, performed, record_of, run_on
from draf_dist.storage import LocalStore, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "run")


def begin(store: Store, token: str = "a") -> AttemptRecord:
    return run_on(store, take(token, 1.5))


def save(store: Store, attempt: AttemptRecord, step: int, world: int = 2) -> str:
    checkpoint = CheckpointName(attempt.number, step).id
    for rank in reversed(range(world)):
        files = {f"rank-{rank:05d}.safetensors": content_of_bytes(b"tensors %d %d" % (step, rank))}
        if rank == 0:
            files["state.json"] = content_of_bytes(b"{}")
        run_on(store, put_part(checkpoint, rank, files))
    run_on(store, commit(attempt, step, world))
    return checkpoint


def test_a_run_folder_holds_attempts_and_checkpoints_under_their_names(store: Store) -> None:
    save(store, begin(store), 120)
    assert store.list() == [
        "attempts/00000001.json",
        "checkpoints/step-00000120-a0000001/manifest.json",
        "checkpoints/step-00000120-a0000001/rank-00000.json",
        "checkpoints/step-00000120-a0000001/rank-00000.safetensors",
        "checkpoints/step-00000120-a0000001/rank-00001.json",
        "checkpoints/step-00000120-a0000001/rank-00001.safetensors",
        "checkpoints/step-00000120-a0000001/state.json",
    ]


def test_an_attempt_inherits_what_its_predecessor_may_restore(store: Store) -> None:
    first = begin(store)
    saved = (save(store, first, 1), save(store, first, 2))
    second = begin(store, "b")
    assert (second.number, second.inherits, second.sealed) == (2, saved, True)
    assert run_on(store, read_attempt(2)) == second
    own = save(store, second, 3)
    assert run_on(store, valid_checkpoints()) == (*saved, own) == begin(store, "c").inherits
    assert run_on(store, numbers()) == [1, 2, 3]


def test_of_two_checkpoints_that_of_the_later_attempt_is_the_newer(store: Store) -> None:
    first = begin(store)
    save(store, first, 5)
    high = save(store, first, 9)
    low = save(store, begin(store, "b"), 7)
    found = run_on(store, newest_good((low, high)))
    assert found is not None
    assert (found.checkpoint, found.broken) == (low, {})
    assert of_step((high, CheckpointName(2, 9).id, low), 9) == CheckpointName(2, 9).id
    assert of_step((high, low), 1) is None


@pytest.mark.parametrize("text", ["step-00000001", "step-1-a0000001", "step-00000001-a0000001.tmp", "manifest.json"])
def test_what_is_no_checkpoint_is_passed_over(store: Store, text: str) -> None:
    assert parse_checkpoint(text) is None
    store.write(f"checkpoints/{text}/manifest.json", b"{}")
    assert begin(store).inherits == ()


def test_names_outlast_their_digits() -> None:
    name = CheckpointName(attempt=12345678, step=123456789)
    assert parse_checkpoint(name.id) == name


def test_what_a_stale_attempt_commits_is_never_seen(store: Store) -> None:
    stale = begin(store)
    save(store, stale, 1)
    newest = begin(store, "b")
    with pytest.raises(SupersededError, match=r"attempts/00000001.json: expected to be the newest attempt, found a later one"):
        save(store, stale, 2)
    # As if its manifest had been on its way when it was superseded.
    late = f"checkpoints/{CheckpointName(1, 2).id}"
    store.write(f"{late}/manifest.json", b"{}")
    kept = save(store, newest, 2)
    assert begin(store, "c").inherits == (CheckpointName(1, 1).id, kept)
    run_on(store, prune(newest, keep=2))
    assert not store.list(late)


def test_a_run_begun_anew_goes_on_counting_and_inherits_nothing(store: Store) -> None:
    stale = begin(store)
    save(store, stale, 1)
    assert run_on(store, begin_anew("fresh", 2.5)).number == 2
    assert run_on(store, valid_checkpoints()) == ()
    with pytest.raises(SupersededError):
        save(store, stale, 2)
    new = begin(store, "b")
    assert (new.number, new.inherits) == (3, ())
    own = save(store, new, 1)
    run_on(store, prune(new, keep=3))
    assert {path.split("/")[1] for path in store.list("checkpoints")} == {own}


def test_a_rank_of_the_run_before_adds_nothing_to_a_checkpoint(store: Store) -> None:
    """No rank but the first asks whether it may still write."""
    stale = begin(store)
    run_on(store, begin_anew("fresh", 2.5))
    new = begin(store, "b")
    of_stale, of_new = CheckpointName(stale.number, 10).id, CheckpointName(new.number, 10).id
    run_on(store, put_part(of_new, 0, {"rank-00000.safetensors": content_of_bytes(b"new 0")}))
    run_on(store, put_part(of_stale, 1, {"rank-00001.safetensors": content_of_bytes(b"stale 1")}))

    def wait(_: float) -> None:
        run_on(store, put_part(of_new, 1, {"rank-00001.safetensors": content_of_bytes(b"new 1")}))

    manifest = run_on(store, commit(new, 10, 2), wait=wait)
    assert manifest.files["rank-00001.safetensors"] == content_of_bytes(b"new 1").record
    found = run_on(store, newest_good((of_new,)))
    assert found is not None
    assert found.manifest == manifest


def test_one_whose_folder_was_removed_under_its_feet_is_not_the_newest(store: Store) -> None:
    attempt = begin(store)
    run_on(store, check_newest(attempt))
    store.delete(attempt_path(1))
    assert not run_on(store, is_newest(attempt))
    other = begin(store, "b")
    assert other.number == attempt.number
    assert not run_on(store, is_newest(attempt))
    assert run_on(store, is_newest(other))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(store: Store) -> None:
    attempt = begin(store)
    good, cut, flipped, without = (save(store, attempt, step) for step in (1, 2, 3, 4))
    store.write(f"checkpoints/{cut}/state.json", b"{")
    store.write(f"checkpoints/{flipped}/rank-00001.safetensors", b"tensors 3 2")
    store.delete(f"checkpoints/{without}/rank-00000.safetensors")
    found = run_on(store, restore(begin(store, "b")))
    assert found is not None
    assert (found.checkpoint, found.manifest.step, found.manifest.world) == (good, 1, 2)
    reasons = {
        cut: "state.json: expected what the checkpoint's manifest says, found 1 bytes instead of 2",
        flipped: "rank-00001.safetensors: expected what the checkpoint's manifest says, found other bytes",
        without: "rank-00000.safetensors: expected what the checkpoint's manifest says, found nothing",
    }
    assert found.broken.keys() == reasons.keys()
    assert all(reason in found.broken[checkpoint] for checkpoint, reason in reasons.items())
    store.write(f"checkpoints/{good}/manifest.json", b"{}")
    with pytest.raises(DataError, match="expected a good checkpoint, found 4, all broken"):
        run_on(store, restore(begin(store, "c")))


def test_a_run_without_checkpoints_begins_at_the_beginning(store: Store) -> None:
    assert run_on(store, restore(begin(store))) is None


def test_the_newest_and_the_best_stay_and_broken_ones_make_no_room(store: Store) -> None:
    first = begin(store)
    one, two, three, four, five = (save(store, first, step) for step in (1, 2, 3, 4, 5))
    second = begin(store, "b")
    six = save(store, second, 6)
    assert run_on(store, prune(second, keep=2, best=(1,), broken=(five,))) == [two, three, five]
    assert run_on(store, valid_checkpoints()) == (one, four, six)
    assert {path.split("/")[1] for path in store.list("checkpoints")} == {one, four, six}


def test_a_manifest_that_comes_again_after_its_removal_counts_for_nothing(store: Store) -> None:
    """Its maker was not told that it was there and made it once more: seed 27426 of the histories."""
    first = begin(store)
    old = save(store, first, 1)
    manifest = store.read(f"checkpoints/{old}/manifest.json")
    second = begin(store, "b")
    assert second.inherits == (old,)
    kept = save(store, second, 2)
    assert run_on(store, prune(second, keep=1)) == [old]
    assert store.create(f"checkpoints/{old}/manifest.json", manifest)
    assert run_on(store, valid_checkpoints()) == (kept,) == begin(store, "c").inherits
    run_on(store, prune(second, keep=2))
    assert not store.list(f"checkpoints/{old}")


def test_one_whose_number_is_anothers_removes_nothing(store: Store) -> None:
    attempt = begin(store)
    saved = save(store, attempt, 1)
    store.delete(attempt_path(1))
    begin(store, "b")
    with pytest.raises(SupersededError):
        run_on(store, prune(attempt, keep=1, broken=(saved,)))


def test_a_commit_waits_until_every_rank_has_put_its_part(store: Store) -> None:
    attempt = begin(store)
    checkpoint, waits = CheckpointName(1, 8).id, []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) >= 7:
            run_on(store, put_part(checkpoint, len(waits) - 7, {f"of rank {len(waits) - 7}": content_of_bytes(b"x")}))

    manifest = run_on(store, commit(attempt, 8, 3), wait=wait)
    assert [part.rank for part in manifest.parts] == [0, 1, 2]
    assert sorted(manifest.files) == ["of rank 0", "of rank 1", "of rank 2"]
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0]


def test_one_who_waits_for_dead_ranks_hears_of_a_later_attempt(store: Store) -> None:
    attempt = begin(store)
    with pytest.raises(SupersededError):
        run_on(store, commit(attempt, 1, 2), wait=lambda _: begin(store, "b"))


def test_a_wait_can_be_given_up(store: Store) -> None:
    def wait(_: float) -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        run_on(store, commit(begin(store), 1, 2), wait=wait)


def test_a_step_is_saved_once(store: Store) -> None:
    attempt = begin(store)
    save(store, attempt, 1)
    run_on(store, commit(attempt, 1, 2))  # the same content: as after an answer that was lost
    run_on(store, put_part(CheckpointName(1, 1).id, 1, {"else": content_of_bytes(b"x")}))
    with pytest.raises(DataError, match="expected no checkpoint yet, found another one"):
        run_on(store, commit(attempt, 1, 2))


def test_an_unreadable_record_is_named(store: Store) -> None:
    begin(store)
    store.write(attempt_path(1), b"\0")
    with pytest.raises(DataError, match=r"attempts/00000001.json: expected the record of an attempt"):
        begin(store, "b")


def test_a_file_is_put_from_disk_and_read_once(store: Store, tmp_path: Path) -> None:
    (tmp_path / "tensors").write_bytes(b"tensors")
    content = content_of_file(tmp_path / "tensors")
    assert content.record == content_of_bytes(b"tensors").record
    attempt = begin(store)
    checkpoint = CheckpointName(1, 1).id
    run_on(store, put_part(checkpoint, 0, {"rank-00000.safetensors": content}))
    run_on(store, commit(attempt, 1, 1))
    fetched: dict[str, bytes] = {}

    def fetch(store: Store, path: str) -> FileRecord:
        fetched[path] = store.read(path)
        return content_of_bytes(fetched[path]).record

    assert run_on(store, newest_good((checkpoint,)), inspect=fetch)
    assert fetched == {f"checkpoints/{checkpoint}/rank-00000.safetensors": b"tensors"}


def test_a_large_file_is_inspected_block_by_block(store: Store) -> None:
    data = bytes(range(256)) * (BLOCK_BYTES // 256) + b"and more"
    store.write("x", data)
    before = store.traffic.snapshot().requests
    assert record_of(store, "x") == content_of_bytes(data).record
    assert store.traffic.snapshot().requests == before + 2
    assert record_of(store, "y") is None


def test_a_head_that_was_taken_back_is_not_passed_over(store: Store) -> None:
    parent = Parent(etag=None)
    move_head(store, "1" * 16, parent)
    move_head(store, "1" * 16, parent)  # said again, by one who was not told
    with pytest.raises(OvertakenError, match="expected version \\(none\\), on which this run builds, found 1111111111111111"):
        move_head(store, "2" * 16, parent)
    etag = store.read_with_etag(HEAD)[1]
    store.delete(HEAD)
    with pytest.raises(OvertakenError, match="found none"):
        move_head(store, "2" * 16, Parent(etag=etag))
    assert not store.exists(HEAD)


def test_what_a_protocol_raises_reaches_the_caller_through_the_driver() -> None:
    def failing(_: Any) -> Any:
        raise TimeoutError

    def steps() -> Any:
        yield Write("x", b"")

    with pytest.raises(TimeoutError):
        drive(steps(), failing)


def test_the_store_of_the_histories_answers_as_a_real_one(store: Store) -> None:
    """Thousands of operations at random, on the same few paths: the answers are the same."""
    assert alike(Random(1), MemoryStore().perform, lambda operation: performed(store, operation), 3000) > 500
