"""A checkpoint of several ranks: every rank puts its files and then a record of them, the first rank commits when all are there.

checkpoints/step-XXXXXXXX-aNNNNNNN/   (step; number of the attempt)
    rank-RRRRR.safetensors            of every rank, and state.json of the first
    rank-RRRRR.json                   PartRecord: what that rank put, written after it
    manifest.json                     all part records; made last. Without it there is no checkpoint
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from draf_dist.errors import DataError, explain
from draf_dist.protocols.attempts import (
    AttemptRecord,
    check_newest,
    committed_in,
    give_up,
    may_restore,
    names_in,
    of_step,
    own_record,
)
from draf_dist.protocols.names import (
    CHECKPOINTS,
    CheckpointName,
    checkpoint_folder,
    checkpoint_name,
    manifest_path,
    part_file,
)
from draf_dist.protocols.operations import Create, Delete, FileRecord, Inspect, List, Read, Steps, Wait, Write
from draf_dist.schema.record import Record

FIRST_LOOK_S, LONGEST_LOOK_S = 0.05, 1.0

RecordT = TypeVar("RecordT", bound=Record)


class PartRecord(Record):
    """rank-RRRRR.json: the files that a rank put, by name."""

    rank: int
    files: dict[str, FileRecord]


class CheckpointManifest(Record):
    """manifest.json. attempt, token: who made it. parts: of every rank, in order."""

    format: Literal[2] = 2
    step: int
    world: int
    attempt: int
    token: str
    parts: tuple[PartRecord, ...]

    @property
    def files(self) -> dict[str, FileRecord]:
        """Every file but the records, by name."""
        return {name: record for part in self.parts for name, record in part.files.items()}


@dataclass(frozen=True)
class Content:
    """A file to be put: its bytes, or the local file that holds them; and what its record will say."""

    data: bytes | memoryview | Path
    record: FileRecord


@dataclass(frozen=True)
class Restorable:
    """A checkpoint whose every file was found as its manifest says. broken: the newer ones that were not, id -> why."""

    checkpoint: str
    manifest: CheckpointManifest
    broken: Mapping[str, str] = field(default_factory=dict)


def content_of_bytes(data: bytes | memoryview) -> Content:
    """Content that is in memory."""
    return Content(data, FileRecord(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


def content_of_file(local: Path) -> Content:
    """Content that is on this machine's disk."""
    with local.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Content(local, FileRecord(size_bytes=local.stat().st_size, sha256=digest))


def put_part(checkpoint: str, rank: int, files: Mapping[str, Content]) -> Steps[PartRecord]:
    """Puts a rank's files, by name, and then the record of them. No two ranks use the same name."""
    folder = checkpoint_folder(checkpoint)
    for name, content in files.items():
        yield Write(f"{folder}/{name}", content.data)
    part = PartRecord(rank=rank, files={name: content.record for name, content in files.items()})
    yield Write(f"{folder}/{part_file(rank)}", encoded(part))
    return part


def commit(attempt: AttemptRecord, step: int, world: int) -> Steps[CheckpointManifest]:
    """Makes a checkpoint of what the ranks put, once all have; called by the first rank. When it returns, the checkpoint counts.

    That it is the newest attempt is asked once more after the manifest is there. If it is then, whoever takes the run over later
    finds this checkpoint; if not, someone may have looked before it was there.

    Raises:
        SupersededError: a later attempt has taken the run over; perhaps it has inherited this checkpoint, perhaps not.
        DataError: a part's record can't be read, or there is another checkpoint at this step of this attempt.
    """
    checkpoint = CheckpointName(attempt.number, step).id
    try:
        parts = yield from parts_of(attempt, checkpoint, world)
        yield from check_newest(attempt)
        manifest = CheckpointManifest(step=step, world=world, attempt=attempt.number, token=attempt.token, parts=parts)
        yield from create_manifest(checkpoint, manifest)
    except DataError:
        # A later attempt removes what it finds of this one: then that is what is wrong.
        yield from check_newest(attempt)
        raise
    yield from check_newest(attempt)
    return manifest


def parts_of(attempt: AttemptRecord, checkpoint: str, world: int) -> Steps[tuple[PartRecord, ...]]:
    """The records of all ranks, waited for as long as this is the newest attempt."""
    folder, wait_s = checkpoint_folder(checkpoint), FIRST_LOOK_S
    paths = [f"{folder}/{part_file(rank)}" for rank in range(world)]
    while not set(paths) <= set((yield List(folder))):
        yield from check_newest(attempt)
        yield Wait(wait_s)
        wait_s = min(2 * wait_s, LONGEST_LOOK_S)
    parts = []
    for path in paths:
        parts.append((yield from read_record(PartRecord, path)))
    return tuple(parts)


def create_manifest(checkpoint: str, manifest: CheckpointManifest) -> Steps[None]:
    """Makes the manifest; to find the same one there is as good: it holds the token of the attempt."""
    path = manifest_path(checkpoint)
    if not (yield Create(path, encoded(manifest))) and (yield from read_record(CheckpointManifest, path)) != manifest:
        remedy = "An attempt saves a step once; to go back, begin a new attempt."
        raise DataError(explain(path, expected="no checkpoint yet", found="another one", remedy=remedy))


def restore(attempt: AttemptRecord) -> Steps[Restorable | None]:
    """What an attempt continues from: of the checkpoints that it inherits the newest that is good; None where it inherits none.

    Raises:
        SupersededError: a later attempt has taken the run over; what is missing may have been removed by it.
        DataError: it inherits checkpoints and none is good.
    """
    try:
        found = yield from newest_good(attempt.inherits)
    except DataError:
        yield from check_newest(attempt)
        raise
    yield from check_newest(attempt)
    return found


def newest_good(checkpoints: Sequence[str]) -> Steps[Restorable | None]:
    """The newest checkpoint of which every file is what its manifest says; None if there is none to choose from.

    checkpoints: ids, those that the attempt inherits. Every file of the candidates is read, the newest candidate's first.

    Raises:
        DataError: there are checkpoints and none is good.
    """
    broken: dict[str, str] = {}
    for checkpoint in sorted(checkpoints, key=checkpoint_name, reverse=True):
        try:
            return Restorable(checkpoint, (yield from whole(checkpoint)), broken)
        except DataError as error:
            broken[checkpoint] = str(error)
    if broken:
        found = f"{len(broken)}, all broken"
        raise DataError(explain(CHECKPOINTS, expected="a good checkpoint", found=found, remedy="Start anew with --fresh."))
    return None


def whole(checkpoint: str) -> Steps[CheckpointManifest]:
    """The manifest of a checkpoint, after every file was read and found as it says.

    Raises:
        DataError: a file is missing or is something else; the message names it.
    """
    manifest = yield from read_record(CheckpointManifest, manifest_path(checkpoint))
    for name, expected in manifest.files.items():
        path = f"{checkpoint_folder(checkpoint)}/{name}"
        found: FileRecord | None = yield Inspect(path)
        if found != expected:
            raise DataError(damaged(path, expected, found))
    return manifest


def prune(attempt: AttemptRecord, *, keep: int, best: Collection[int] = (), broken: Collection[str] = ()) -> Steps[list[str]]:
    """Removes what nobody continues from any more; returns the ids removed. Called only after a commit of this attempt returned.

    Of the valid checkpoints stay the newest `keep` and those of the best steps; those that were found broken don't count and go. So
    does what older attempts left: unfinished, or committed when they were no longer the newest. An attempt that is superseded
    meanwhile removes nothing that its successor lacks: the successor has found the commit that came before this.

    Raises:
        SupersededError: the run was begun anew.
    """
    record = yield from own_record(attempt)
    paths: list[str] = yield List(CHECKPOINTS)
    valid = tuple(name.id for name in committed_in(paths) if may_restore(record, name) and name.id not in broken)
    stay = {*valid[-keep:], *(of_step(valid, step) for step in best)}
    removed = [name.id for name in names_in(paths) if name.id not in stay and is_past(record, name, valid)]
    yield from give_up(record, removed)
    for checkpoint in removed:
        yield from remove(checkpoint, paths)
    return removed


def is_past(attempt: AttemptRecord, name: CheckpointName, valid: Sequence[str]) -> bool:
    """Whether a checkpoint is one that this attempt may remove: an older attempt's, or its own once it is committed."""
    return name.attempt < attempt.number or name.id in valid


def remove(checkpoint: str, paths: Sequence[str]) -> Steps[None]:
    """Removes a checkpoint, of all paths those that are its; the manifest first: nothing half removed looks whole."""
    folder = f"{checkpoint_folder(checkpoint)}/"
    manifest = manifest_path(checkpoint)
    yield Delete(manifest)
    for path in paths:
        if path.startswith(folder) and path != manifest:
            yield Delete(path)


def read_record(model: type[RecordT], path: str) -> Steps[RecordT]:
    """A record that is to be there.

    Raises:
        DataError: it is not, or can't be read.
    """
    data: bytes | None = yield Read(path)
    if data is None:
        raise DataError(damaged(path, None, None))
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        found = "something that can't be read"
        raise DataError(explain(path, expected="a record", found=found, remedy="This checkpoint is not used.")) from error


def encoded(record: Record) -> bytes:
    """A record as it is stored."""
    return record.model_dump_json().encode()


def damaged(path: str, expected: FileRecord | None, found: FileRecord | None) -> str:
    """What is wrong with a file."""
    what = "nothing" if found is None else "other bytes"
    if found is not None and expected is not None and found.size_bytes != expected.size_bytes:
        what = f"{found.size_bytes} bytes instead of {expected.size_bytes}"
    remedy = "This checkpoint is not used."
    return explain(path, expected="what the checkpoint's manifest says", found=what, remedy=remedy)
