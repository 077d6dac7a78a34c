"""Attempts at a run: each takes a number, the newest may go on, and what any older one still writes is never seen.

attempts/NNNNNNNN.json is made with create-only, so no two attempts share a number; numbers follow one another without a gap. An
attempt first takes its number and only then looks which checkpoints there are: whatever an older one was told to be committed was
there before (`checkpoint.commit` looks for a newer attempt afterwards), so none is missed, without a clock and without a lock.
Valid are the checkpoints of the newest attempt's own number and those that it found then: what an older one commits later is
neither. No record is ever removed: a run that is begun anew in the same folder goes on counting.
"""

import math
from collections.abc import Collection, Iterable, Sequence

from pydantic import ValidationError

from draf_dist.errors import DataError, GateError, explain
from draf_dist.protocols.names import (
    ATTEMPTS,
    CHECKPOINTS,
    MANIFEST,
    CheckpointName,
    attempt_path,
    checkpoint_name,
    parse_attempt,
    parse_checkpoint,
)
from draf_dist.protocols.operations import Create, List, Read, Size, Steps, Write
from draf_dist.schema.record import Record


class SupersededError(GateError):
    """A later attempt has taken the run over: this one may neither report nor save nor promote."""


class AttemptRecord(Record):
    """attempts/NNNNNNNN.json. token: names the process that took the number. started: seconds since 1970.

    inherits: ids of the checkpoints that it may continue from besides its own, oldest first. sealed: whether it has looked for
    them yet; an attempt that died before has neither restored nor saved anything.
    """

    number: int
    token: str
    started: float
    sealed: bool = False
    inherits: tuple[str, ...] = ()


def take(token: str, started: float) -> Steps[AttemptRecord]:
    """Makes this the newest attempt. token: unique to this call; started: seconds since 1970.

    Raises:
        DataError: the record of an earlier attempt can't be read.
    """
    claim = yield from claim_number(token, started)
    inherits = yield from valid_checkpoints(below=claim.number)
    record = claim.model_copy(update={"sealed": True, "inherits": inherits})
    # Nobody else writes to this number.
    yield Write(attempt_path(record.number), encoded(record))
    return record


def begin_anew(token: str, started: float) -> Steps[AttemptRecord]:
    """Takes a number for nobody: whoever comes later asks this record what it inherits, and that is nothing.

    So what older attempts made, and what those of them that still live will make, is in nobody's list, and under numbers that
    are not used again. The records stay, also when all else of the run is removed.
    """
    return (yield from claim_number(token, started, sealed=True))


def claim_number(token: str, started: float, *, sealed: bool = False) -> Steps[AttemptRecord]:
    """The next free number, taken: from here on every older attempt is superseded. sealed: there is nothing to look for."""
    while True:
        taken = yield from numbers()
        claim = AttemptRecord(number=1 + max(taken, default=0), token=token, started=started, sealed=sealed)
        created: bool = yield Create(attempt_path(claim.number), encoded(claim))
        if created or (yield from is_holder(claim)):
            return claim


def numbers() -> Steps[list[int]]:
    """The numbers that are taken, lowest first."""
    paths: list[str] = yield List(ATTEMPTS)
    return sorted(number for path in paths if (number := parse_attempt(path)) is not None)


def read_attempt(number: int) -> Steps[AttemptRecord | None]:
    """The record of an attempt, None where there is none.

    Raises:
        DataError: it can't be read.
    """
    data: bytes | None = yield Read(attempt_path(number))
    if data is None:
        return None
    try:
        return AttemptRecord.model_validate_json(data)
    except ValidationError as error:
        remedy = "Start anew with --fresh."
        where, found = attempt_path(number), "something that can't be read"
        raise DataError(explain(where, expected="the record of an attempt", found=found, remedy=remedy)) from error


def is_holder(attempt: AttemptRecord) -> Steps[bool]:
    """Whether the number is this attempt's: its own creation may have succeeded although it was told otherwise."""
    found = yield from read_attempt(attempt.number)
    return found is not None and found.token == attempt.token


def is_newest(attempt: AttemptRecord) -> Steps[bool]:
    """Whether no later attempt has begun; also False where the folder was removed under this attempt's feet."""
    if not (yield from is_holder(attempt)):
        return False
    later: int | None = yield Size(attempt_path(attempt.number + 1))
    return later is None


def own_record(attempt: AttemptRecord) -> Steps[AttemptRecord]:
    """The attempt's record as it is now: what it inherits gets less.

    Raises:
        SupersededError: the number is another's.
    """
    found = yield from read_attempt(attempt.number)
    if found is None or found.token != attempt.token:
        raise superseded(attempt)
    return found


def give_up(record: AttemptRecord, checkpoints: Collection[str]) -> Steps[None]:
    """Takes checkpoints out of what an attempt inherits, before they are removed.

    One that made such a checkpoint and was not told may make its manifest once more, after its files are gone: nobody looks for it.
    """
    left = tuple(each for each in record.inherits if each not in checkpoints)
    if left != record.inherits:
        yield Write(attempt_path(record.number), encoded(record.model_copy(update={"inherits": left})))


def check_newest(attempt: AttemptRecord) -> Steps[None]:
    """Asks whether this is still the newest attempt.

    Raises:
        SupersededError: it is not.
    """
    if not (yield from is_newest(attempt)):
        raise superseded(attempt)


def superseded(attempt: AttemptRecord) -> SupersededError:
    """The error of an attempt that is not the newest any more."""
    remedy = "Nothing more is written by this one; follow the other."
    return SupersededError(
        explain(attempt_path(attempt.number), expected="to be the newest attempt", found="a later one", remedy=remedy)
    )


def valid_checkpoints(below: float = math.inf) -> Steps[tuple[str, ...]]:
    """Ids of the committed checkpoints that the newest attempt may continue from, oldest first: its own and those it inherits.

    below: of the attempts with a lower number than this. One that has not looked yet has none, so the newest that has is asked.

    Raises:
        DataError: the record of an attempt can't be read.
    """
    for number in reversed((yield from numbers())):
        record = (yield from read_attempt(number)) if number < below else None
        if record is not None and record.sealed:
            paths: list[str] = yield List(CHECKPOINTS)
            return tuple(name.id for name in committed_in(paths) if may_restore(record, name))
    return ()


def may_restore(attempt: AttemptRecord, name: CheckpointName) -> bool:
    """Whether a committed checkpoint is one that this attempt may continue from."""
    return name.attempt == attempt.number or name.id in attempt.inherits


def committed_in(paths: Sequence[str]) -> list[CheckpointName]:
    """Of what lies below checkpoints/, every checkpoint that has its manifest, whoever made it, oldest first."""
    return names_in(path for path in paths if path.endswith(f"/{MANIFEST}"))


def names_in(paths: Iterable[str]) -> list[CheckpointName]:
    """The checkpoints, finished or not, that paths below checkpoints/ belong to, oldest first."""
    folders = {path.split("/")[1] for path in paths}
    return sorted(name for name in map(parse_checkpoint, folders) if name is not None)


def of_step(checkpoints: tuple[str, ...], step: int) -> str | None:
    """The newest of some checkpoints that has this step, None where none has."""
    return max((each for each in checkpoints if checkpoint_name(each).step == step), key=checkpoint_name, default=None)


def encoded(attempt: AttemptRecord) -> bytes:
    """An attempt's record as it is stored."""
    return attempt.model_dump_json().encode()
