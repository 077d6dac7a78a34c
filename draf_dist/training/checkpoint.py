"""Checkpoints of a run on any store: found, read, verified. How they come to be: saving.py, and protocols/checkpoint.py.

checkpoints/step-XXXXXXXX-aNNNNNNN/ (step, attempt) holds rank-RRRRR.safetensors and rank-RRRRR.json of every rank that saved (see
fragments.py), state.json, and manifest.json, which comes last. No manifest, no checkpoint; no pickle ever.
"""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pydantic import ValidationError

from draf_dist.errors import DataError, explain
from draf_dist.protocols.attempts import of_step, valid_checkpoints
from draf_dist.protocols.checkpoint import whole
from draf_dist.protocols.names import CHECKPOINTS, MANIFEST, STATE, checkpoint_folder, checkpoint_name
from draf_dist.protocols.operations import FileRecord, run_on
from draf_dist.storage import MissingError, Store
from draf_dist.training.fragments import WholeTensors
from draf_dist.training.state import RunState

FILES_AT_ONCE = 8
TENSORS = ".safetensors"
# Before checkpoints were saved by all ranks, and named by their attempt.
_EARLIER = re.compile(rf"{CHECKPOINTS}/step-\d{{8}}/{MANIFEST}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, every file of it verified."""

    state: RunState
    tensors: WholeTensors


@dataclass(frozen=True)
class Checkpoints:
    """Those of one run that may be continued from. keep: how many of the newest stay; keep_best: how many of the best by score."""

    store: Store
    keep: int
    keep_best: int = 1

    def ids(self) -> tuple[str, ...]:
        """Ids of those that have a manifest, oldest first; whether their files are good is not known yet."""
        return run_on(self.store, valid_checkpoints())

    def steps(self) -> list[int]:
        """Their steps, oldest first, each once: one that was saved before its validation is saved again with it."""
        return list(dict.fromkeys(checkpoint_name(checkpoint).step for checkpoint in self.ids()))

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step; the newest attempt's, where several have one.

        Raises:
            DataError: there is none, or it is broken.
        """
        found = of_step(self.ids(), step)
        if found is None:
            where = self.store.where(CHECKPOINTS)
            raise DataError(explain(where, expected=f"one of step {step}", found="none", remedy="Start anew with --fresh."))
        return self.read(found)

    def read(self, checkpoint: str) -> Checkpoint:
        """A checkpoint by its id. Every file is read once, several at a time.

        All files together are in memory then, about three times the parameters: a caller lets go of them soon.

        Raises:
            DataError: a file is missing or is not what the manifest says; the message names it.
        """
        files = self._files(checkpoint)
        try:
            run_on(self.store, whole(checkpoint), inspect=lambda store, path: files[path].record if path in files else None)
        except DataError as error:
            raise DataError(f"{self.store.url}/{error}") from error
        folder = checkpoint_folder(checkpoint)
        tensors = (file.data for path, file in files.items() if path.endswith(TENSORS))
        return Checkpoint(self._state(checkpoint, files[f"{folder}/{STATE}"].data), WholeTensors(tensors, self.store.where(folder)))

    def score(self, checkpoint: str) -> float | None:
        """The score that validation gave at a checkpoint; None if there was no validation, or its state can't be read."""
        try:
            return self._state(checkpoint, self.store.read(f"{checkpoint_folder(checkpoint)}/{STATE}")).score
        except (MissingError, DataError):
            return None

    def refuse_earlier_format(self) -> None:
        """Refuses a run whose only checkpoints are of a format that is not read any more.

        Raises:
            DataError: it is one.
        """
        if not self.ids() and any(map(_EARLIER.fullmatch, self.store.list(CHECKPOINTS))):
            expected, found = "checkpoints that all ranks wrote", "those of an earlier version of draf"
            remedy = "Finish the run with that version, or start anew with --fresh."
            raise DataError(explain(self.store.where(CHECKPOINTS), expected=expected, found=found, remedy=remedy))

    def _files(self, checkpoint: str) -> dict[str, "_File"]:
        """What lies in a checkpoint's folder besides records, by path."""
        paths = [path for path in self.store.list(checkpoint_folder(checkpoint)) if path.endswith((TENSORS, f"/{STATE}"))]
        with ThreadPoolExecutor(FILES_AT_ONCE, "checkpoint-read") as pool:
            found = pool.map(self._file, paths)
            return {path: file for path, file in zip(paths, found, strict=True) if file is not None}

    def _file(self, path: str) -> "_File | None":
        try:
            data = self.store.read(path)
        except MissingError:
            return None
        return _File(data, FileRecord(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))

    def _state(self, checkpoint: str, data: bytes) -> RunState:
        try:
            return RunState.model_validate_json(data)
        except ValidationError as error:
            where, found = self.store.where(f"{checkpoint_folder(checkpoint)}/{STATE}"), "something that can't be read"
            raise DataError(explain(where, expected="a run's state", found=found, remedy="This checkpoint is not used.")) from error


@dataclass(frozen=True)
class _File:
    data: bytes
    record: FileRecord
