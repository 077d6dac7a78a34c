"""The history of a registered model: every promotion and roll-back, in tags that are set once. It decides who is champion."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from draf_dist.continual.verdict import Verdict
from draf_dist.continual.version import CHAMPION
from draf_dist.protocols.operations import Create, List, Operation, Read, Size, Write, drive
from draf_dist.protocols.promote import append, follow
from draf_dist.schema.record import Record

HISTORY = "draf.history"


class Move(Record):
    """One entry of a model's history: who became champion after whom, when (UTC) and why.

    policy, holdout: of the verdict that a promotion rests on, eight hex digits and URL@version; "" without one.
    """

    action: Literal["promote", "rollback"]
    version: int
    previous: int | None
    time: str
    reason: str
    policy: str = ""
    holdout: str = ""


@dataclass
class Tags:
    """A model's tags, while a lock keeps others from them: what the protocol of promotions takes for a store.

    tags: as they are now. set_tag, set_alias: called with a name and what it is to hold.
    """

    tags: dict[str, str]
    set_tag: Callable[[str, str], object]
    set_alias: Callable[[str, str], object]

    def append(self, move_after: Callable[[], Move | None]) -> Move | None:
        """Adds what is to follow the moves so far, if anything, and lets the alias follow.

        The history first: if this process dies between the two, the next one mends the alias.
        """

        def entry_after(_: Sequence[bytes]) -> bytes | None:
            move = move_after()
            return None if move is None else move.model_dump_json().encode()

        entry = drive(append(HISTORY, entry_after), self.perform)
        if entry is None:
            return None
        drive(follow(HISTORY, CHAMPION, _champion_after), self.perform)
        return Move.model_validate_json(entry)

    def perform(self, operation: Operation) -> Any:
        """One operation: an entry HISTORY/000007 is the tag HISTORY.000007, what is written is an alias."""
        match operation:
            case List(prefix):
                return [f"{prefix}/{key.removeprefix(prefix + '.')}" for key in sorted(self.tags) if key.startswith(f"{prefix}.")]
            case Read(path):
                return self.tags[_tag(path)].encode()
            case Size(path):
                return len(self.tags[_tag(path)]) if _tag(path) in self.tags else None
            case Create(path, data) if _tag(path) not in self.tags:
                self.set_tag(_tag(path), data.decode())
                self.tags[_tag(path)] = data.decode()
                return True
            case Write(alias, bytes() as data):
                return self.set_alias(alias, data.decode())
        raise AssertionError(f"nothing that promoting a model needs: {operation}")


def moves_in(tags: Mapping[str, str]) -> list[Move]:
    """Every promotion and roll-back, oldest first; tags: of a model."""
    return [Move.model_validate_json(tags[key]) for key in sorted(tags) if key.startswith(f"{HISTORY}.")]


def promotion(version: int, previous: int | None, reason: str, verdict: Verdict | None) -> Move:
    """A promotion that happens now; verdict: that it rests on."""
    move = Move(action="promote", version=version, previous=previous, time=_now(), reason=reason)
    if verdict is None or verdict.lineage is None:
        return move
    return move.model_copy(update={"policy": verdict.policy_fingerprint, "holdout": verdict.lineage.holdout})


def roll_back(version: int, previous: int, reason: str) -> Move:
    """A roll-back that happens now."""
    return Move(action="rollback", version=version, previous=previous, time=_now(), reason=reason)


def line_of_champions(history: Sequence[Move]) -> list[int]:
    """Whoever is champion last, after those that a rollback would return to."""
    line: list[int] = []
    for move in history:
        if move.action == "promote":
            line.append(move.version)
        else:
            line.pop()
    return line


def _champion_after(entries: Sequence[bytes]) -> bytes:
    return str(line_of_champions([Move.model_validate_json(entry) for entry in entries])[-1]).encode()


def _tag(path: str) -> str:
    return path.replace("/", ".")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
