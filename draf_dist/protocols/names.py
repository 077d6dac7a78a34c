"""Where attempts and checkpoints lie in a run folder."""

import re
from typing import NamedTuple

ATTEMPTS = "attempts"
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"

_ATTEMPT = re.compile(rf"{ATTEMPTS}/(\d{{8,}})\.json")
_CHECKPOINT = re.compile(r"step-(\d{8,})-a(\d{7,})")


class CheckpointName(NamedTuple):
    """Which checkpoint. The later attempt's is the newer one, and of one attempt that of the higher step: so they sort.

    A later attempt goes on from what it restored: where that was not the highest step (a damaged checkpoint, a roll-back), what
    lies past it belongs to a line that nobody follows any more.
    """

    attempt: int
    step: int

    @property
    def id(self) -> str:
        """The name of its folder: two attempts never write to the same place."""
        return f"step-{self.step:08d}-a{self.attempt:07d}"


def parse_checkpoint(text: str) -> CheckpointName | None:
    """The checkpoint that a folder name stands for, None where it is no such name."""
    found = _CHECKPOINT.fullmatch(text)
    return None if found is None else CheckpointName(attempt=int(found[2]), step=int(found[1]))


def checkpoint_name(checkpoint: str) -> CheckpointName:
    """The same of an id."""
    name = parse_checkpoint(checkpoint)
    assert name is not None, checkpoint
    return name


def parse_attempt(path: str) -> int | None:
    """The number of the attempt whose record lies at a path, None for any other path."""
    found = _ATTEMPT.fullmatch(path)
    return None if found is None else int(found[1])


def attempt_path(number: int) -> str:
    """Where the record of an attempt lies."""
    return f"{ATTEMPTS}/{number:08d}.json"


def checkpoint_folder(checkpoint: str) -> str:
    """Where a checkpoint lies; checkpoint: its id."""
    return f"{CHECKPOINTS}/{checkpoint}"


def manifest_path(checkpoint: str) -> str:
    """The file that makes a checkpoint of a folder."""
    return f"{CHECKPOINTS}/{checkpoint}/{MANIFEST}"


def tensors_file(rank: int) -> str:
    """The name of the file with a rank's tensors."""
    return f"rank-{rank:05d}.safetensors"


def part_file(rank: int) -> str:
    """The name of the record of a rank's files."""
    return f"rank-{rank:05d}.json"
