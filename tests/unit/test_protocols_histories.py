"""The protocols through tens of thousands of histories of crashes, lost answers and stale actors; and without each of their rules.

`make chaos` runs 1e5 histories of each (benchmarks/protocols.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import ModuleType
from typing import Any

import pytest
from interleaved import World, caught_after, histories
from interleaved_moves import DataSet, Registry
from interleaved_runs import Run

from draf_dist.errors import DataError
from draf_dist.protocols import attempts, checkpoint, promote, publish
from draf_dist.protocols.attempts import AttemptRecord, SupersededError
from draf_dist.protocols.checkpoint import CheckpointManifest, Content, PartRecord, Restorable
from draf_dist.protocols.names import CHECKPOINTS, CheckpointName, attempt_path, checkpoint_folder, manifest_path, part_file
from draf_dist.protocols.operations import Create, Delete, List, Read, ReadWithEtag, Size, Steps, Swap, Write

HISTORIES = 20_000
# Within so many histories whatever is wrong has to show.
CAUGHT_WITHIN = 20_000


@pytest.mark.slow
@pytest.mark.parametrize("world", [Run, DataSet, Registry])
def test_nothing_that_must_not_happen_happens(world: Callable[[Random], World]) -> None:
    assert histories(world, range(HISTORIES)) > 30 * HISTORIES


def test_a_history_is_the_same_whenever_its_seed_is() -> None:
    assert histories(Run, range(100, 110)) == histories(Run, range(100, 110))


# What each function would be without one of its rules.


def number_by_write(token: str, started: float, *, sealed: bool = False) -> Steps[AttemptRecord]:
    number = 1 + max((yield from attempts.numbers()), default=0)
    claim = AttemptRecord(number=number, token=token, started=started, sealed=sealed)
    yield Write(attempt_path(claim.number), attempts.encoded(claim))
    return claim


def number_without_a_look_at_the_answer(token: str, started: float, *, sealed: bool = False) -> Steps[AttemptRecord]:
    number = 1 + max((yield from attempts.numbers()), default=0)
    claim = AttemptRecord(number=number, token=token, started=started, sealed=sealed)
    yield Create(attempt_path(claim.number), attempts.encoded(claim))
    return claim


def anew_from_the_first_number(token: str, started: float) -> Steps[None]:
    for number in (yield from attempts.numbers()):
        yield Delete(attempt_path(number))


def anew_without_the_records_before(token: str, started: float) -> Steps[None]:
    record = yield from attempts.claim_number(token, started, sealed=True)
    for number in reversed((yield from attempts.numbers())):
        if number < record.number:
            yield Delete(attempt_path(number))


def anew_like_any_attempt(token: str, started: float) -> Steps[AttemptRecord]:
    return (yield from attempts.claim_number(token, started))


def look_before_the_number_is_taken(token: str, started: float) -> Steps[AttemptRecord]:
    while True:
        inherits = yield from attempts.valid_checkpoints()
        number = 1 + max((yield from attempts.numbers()), default=0)
        record = AttemptRecord(number=number, token=token, started=started, sealed=True, inherits=inherits)
        if (yield Create(attempt_path(number), attempts.encoded(record))) or (yield from attempts.is_holder(record)):
            return record


def inherit_of_the_attempt_before_alone(below: float = 0) -> Steps[tuple[str, ...]]:
    """As if an attempt that died before it had looked had inherited nothing."""
    record = yield from attempts.read_attempt(int(below) - 1)
    paths: list[str] = yield List(CHECKPOINTS)
    return tuple(name.id for name in attempts.committed_in(paths) if record and attempts.may_restore(record, name))


def inherit_all(below: float = 0) -> Steps[tuple[str, ...]]:
    paths: list[str] = yield List(CHECKPOINTS)
    return tuple(name.id for name in attempts.committed_in(paths))


def commit_without_a_second_look(attempt: AttemptRecord, step: int, world: int) -> Steps[None]:
    name = CheckpointName(attempt.number, step).id
    parts = yield from checkpoint.parts_of(attempt, name, world)
    yield from checkpoint.check_newest(attempt)
    yield from checkpoint.create_manifest(name, manifest_of(attempt, step, parts))


def commit_without_parts(attempt: AttemptRecord, step: int, world: int) -> Steps[None]:
    name = CheckpointName(attempt.number, step).id
    parts = tuple(PartRecord(rank=rank, files={}) for rank in range(world))
    yield from checkpoint.create_manifest(name, manifest_of(attempt, step, parts))
    yield from checkpoint.check_newest(attempt)


def commit_that_believes_a_refusal(attempt: AttemptRecord, step: int, world: int) -> Steps[None]:
    name = CheckpointName(attempt.number, step).id
    parts = yield from checkpoint.parts_of(attempt, name, world)
    if not (yield Create(manifest_path(name), checkpoint.encoded(manifest_of(attempt, step, parts)))):
        raise SupersededError
    yield from checkpoint.check_newest(attempt)


def commit_that_blames_the_store(attempt: AttemptRecord, step: int, world: int) -> Steps[None]:
    """Not asking who removed a part."""
    name = CheckpointName(attempt.number, step).id
    parts = yield from checkpoint.parts_of(attempt, name, world)
    yield from checkpoint.create_manifest(name, manifest_of(attempt, step, parts))
    yield from checkpoint.check_newest(attempt)


def manifest_of(attempt: AttemptRecord, step: int, parts: tuple[PartRecord, ...]) -> CheckpointManifest:
    world = len(parts)
    return CheckpointManifest(step=step, world=world, attempt=attempt.number, token=attempt.token, parts=parts)


def record_before_the_files(name: str, rank: int, files: Mapping[str, Content]) -> Steps[None]:
    folder = checkpoint_folder(name)
    part = PartRecord(rank=rank, files={file: content.record for file, content in files.items()})
    yield Write(f"{folder}/{part_file(rank)}", checkpoint.encoded(part))
    for file, content in files.items():
        yield Write(f"{folder}/{file}", content.data)


def name_without_attempt(self: CheckpointName) -> str:
    return f"step-{self.step:08d}-a0000001"


def restore_unseen(attempt: AttemptRecord) -> Steps[Restorable | None]:
    for name in reversed(attempt.inherits):
        data = yield Read(manifest_path(name))
        if data is not None:
            return Restorable(name, CheckpointManifest.model_validate_json(data))
    return None


def restore_without_falling_back(attempt: AttemptRecord) -> Steps[Restorable | None]:
    yield from attempts.check_newest(attempt)
    return (yield from checkpoint.newest_good(attempt.inherits[-1:]))


def restore_though_superseded(attempt: AttemptRecord) -> Steps[Restorable | None]:
    try:
        return (yield from checkpoint.newest_good(attempt.inherits))
    except DataError:
        yield from attempts.check_newest(attempt)
        raise


def prune_with(
    *,
    valid: bool = True,
    broken_go: bool = True,
    best_stays: bool = True,
    all_go: bool = False,
    manifest_first: bool = True,
    unfinished_stay: bool = True,
) -> Any:
    """`prune` without one of its rules."""

    def prune(attempt: AttemptRecord, *, keep: int, best: Sequence[int], broken: Sequence[str] = ()) -> Steps[list[str]]:
        attempt = yield from attempts.own_record(attempt)
        paths: list[str] = yield List(CHECKPOINTS)
        names = [name for name in attempts.committed_in(paths) if not valid or attempts.may_restore(attempt, name)]
        known = tuple(name.id for name in names if not broken_go or name.id not in broken)
        stay = {*known[-keep:], *(attempts.of_step(known, step) for step in best if best_stays)}
        yield from attempts.give_up(attempt, {name.id for name in names} - stay)
        for name in attempts.names_in(paths):
            past = checkpoint.is_past(attempt, name, known) or not unfinished_stay
            if past and (all_go or name.id not in stay):
                order = [path for path in paths if path.startswith(checkpoint_folder(name.id))]
                for path in order if manifest_first else sorted(order, key=lambda path: path.endswith("manifest.json")):
                    yield Delete(path)
        return []

    return prune


def no_look(attempt: AttemptRecord) -> Steps[None]:
    yield Size("nothing")


def keep_for_ever(attempt: AttemptRecord, **_: Any) -> Steps[list[str]]:
    yield List(CHECKPOINTS)
    return []


def head_by_write(path: str, data: bytes, etag: str | None) -> Steps[bool]:
    yield Write(path, data)
    return True


def head_by_its_newest_tag(path: str, data: bytes, etag: str | None) -> Steps[bool]:
    found = yield ReadWithEtag(path)
    return (yield Create(path, data)) if found is None else (yield Swap(path, data, found[1]))


def head_that_believes_a_refusal(path: str, data: bytes, etag: str | None) -> Steps[bool]:
    return (yield Create(path, data)) if etag is None else (yield Swap(path, data, etag))


def release_last_file_first(files: Mapping[str, bytes], last: str, data: bytes) -> Steps[None]:
    yield Create(last, data)
    for path, content in files.items():
        if (yield Size(path)) != len(content):
            yield Write(path, content)


def entry_by_write(history: str, entry_after: Any) -> Steps[bytes | None]:
    entries = yield from promote.read_history(history)
    entry = entry_after(entries)
    if entry is not None:
        yield Write(promote.entry_path(history, len(entries)), entry)
    return entry


def entry_decided_once(history: str, entry_after: Any) -> Steps[bytes | None]:
    entry = None
    while True:
        entries = yield from promote.read_history(history)
        entry = entry or entry_after(entries)
        path = promote.entry_path(history, len(entries))
        if entry is None or (yield Create(path, entry)) or (yield Read(path)) == entry:
            return entry


def entry_that_believes_a_refusal(history: str, entry_after: Any) -> Steps[bytes | None]:
    while True:
        entries = yield from promote.read_history(history)
        entry = entry_after(entries)
        if entry is None or (yield Create(promote.entry_path(history, len(entries)), entry)):
            return entry


def alias_once(history: str, alias: str, alias_after: Any) -> Steps[None]:
    yield Write(alias, alias_after((yield from promote.read_history(history))))


@dataclass(frozen=True)
class Mutation:
    """A rule left out: what stands where, and the words of what then happens."""

    world: Callable[[Random], World]
    says: str
    replaced: list[tuple[ModuleType | type, str, Any]]


def run(says: str, *replaced: tuple[ModuleType | type, str, Any]) -> Mutation:
    return Mutation(Run, says, list(replaced))


def data_set(says: str, name: str, mutant: Any) -> Mutation:
    return Mutation(DataSet, says, [(publish, name, mutant)])


def registry(says: str, name: str, mutant: Any) -> Mutation:
    return Mutation(Registry, says, [(promote, name, mutant)])


MUTATIONS = {
    "a number is written, not created": run("two attempts have number", (attempts, "claim_number", number_by_write)),
    "a refused number is used": run("two attempts have number", (attempts, "claim_number", number_without_a_look_at_the_answer)),
    "a later attempt looks before it takes its number": run(
        "reported and attempt . goes back", (attempts, "take", look_before_the_number_is_taken)
    ),
    "one that died before it looked had nothing": run(
        "reported and attempt . goes back", (attempts, "valid_checkpoints", inherit_of_the_attempt_before_alone)
    ),
    "a run begun anew counts from the beginning": run(
        "two attempts have number", (attempts, "begin_anew", anew_from_the_first_number)
    ),
    "a run begun anew counts from the beginning, and ranks of both put parts": run(
        "is not whole",
        (attempts, "begin_anew", anew_from_the_first_number),
        (Run, "_check_taken", lambda self, view, record: setattr(view, "record", record)),
    ),
    "a run begun anew removes the records before": run(
        "after a later one had begun", (attempts, "begin_anew", anew_without_the_records_before)
    ),
    "a run begun anew inherits": run("although the run was begun anew", (attempts, "begin_anew", anew_like_any_attempt)),
    "whatever is committed may be restored": run("and not inherited by", (attempts, "valid_checkpoints", inherit_all)),
    "nobody looks for a later attempt": run("after a later one had begun", (checkpoint, "check_newest", no_look)),
    "a commit looks for a later attempt before only": run(
        "after a later one had begun", (checkpoint, "commit", commit_without_a_second_look)
    ),
    "a commit looks before only, and what it reported is lost": run(
        "reported and attempt . goes back",
        (checkpoint, "commit", commit_without_a_second_look),
        (Run, "_check_may_report", lambda self, record, step: None),
    ),
    "a manifest before the parts": run("is not whole", (checkpoint, "commit", commit_without_parts)),
    "a commit that believes a refusal": run("the newest attempt was told", (checkpoint, "commit", commit_that_believes_a_refusal)),
    "a commit that misses a part and does not ask why": run(
        "an error that nobody caused", (checkpoint, "commit", commit_that_blames_the_store)
    ),
    "a part's record before its files": run("goes back|not whole", (checkpoint, "put_part", record_before_the_files)),
    "a name without the attempt": run(
        "is not whole",
        (CheckpointName, "id", property(name_without_attempt)),
        (attempts, "may_restore", lambda attempt, name: True),
        (checkpoint, "may_restore", lambda attempt, name: True),
    ),
    "a restore that trusts the manifest": run("is not whole", (checkpoint, "restore", restore_unseen)),
    "a restore that does not fall back": run("expected a good checkpoint", (checkpoint, "restore", restore_without_falling_back)),
    "a restore by one who is superseded": run("goes back", (checkpoint, "restore", restore_though_superseded)),
    "what a stale attempt left counts among those kept": run("were to be kept", (checkpoint, "prune", prune_with(valid=False))),
    "a broken one counts among those kept": run("were to be kept", (checkpoint, "prune", prune_with(broken_go=False))),
    "the best is removed": run("the best checkpoint is gone", (checkpoint, "prune", prune_with(best_stays=False))),
    "the only good one is removed": run("goes back", (checkpoint, "prune", prune_with(all_go=True))),
    "files are removed before the manifest": run("not whole", (checkpoint, "prune", prune_with(manifest_first=False))),
    "what is still being written is removed": run("no progress", (checkpoint, "prune", prune_with(unfinished_stay=False))),
    "nothing is removed": run("that nobody needs are still there", (checkpoint, "prune", keep_for_ever)),
    "HEAD is written": data_set("on which it does not build", "move_head", head_by_write),
    "HEAD is swapped by a tag of its own": data_set("on which it does not build", "move_head", head_by_its_newest_tag),
    "a move of HEAD that believes a refusal": data_set("was told that another's is", "move_head", head_that_believes_a_refusal),
    "release.json before the files": data_set("not complete", "write_release", release_last_file_first),
    "a promotion is written, not created": registry("has changed", "append", entry_by_write),
    "a promotion is decided once": registry("not judged against it", "append", entry_decided_once),
    "a promotion that believes a refusal": registry("is 2 times in the history", "append", entry_that_believes_a_refusal),
    "the alias is written once": registry("the alias names another version", "follow", alias_once),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_rule_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[name]
    for place, of, mutant in mutation.replaced:
        monkeypatch.setattr(place, of, mutant)
    after = caught_after(mutation.world, mutation.says, CAUGHT_WITHIN)
    print(f"{name}: after {after} histories: {mutation.says}")
    assert after
