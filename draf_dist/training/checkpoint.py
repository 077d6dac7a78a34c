"""Checkpoints on any store: files first, a manifest with their size and sha256 last. No manifest, no checkpoint; no pickle ever.

checkpoints/step-XXXXXXXX/ holds what the backend saved (parameters, optimizer state), state.json and manifest.json.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from draf_dist.config.spec import canonical_json
from draf_dist.errors import DataError, explain
from draf_dist.schema.modality import Record
from draf_dist.storage import Store
from draf_dist.training.journal import room
from draf_dist.training.state import RunState

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"

RecordT = TypeVar("RecordT", bound=Record)


class FileRecord(Record):
    """One file of a checkpoint."""

    size_bytes: int
    sha256: str


class CheckpointManifest(Record):
    """manifest.json: every other file of the folder."""

    format: Literal[1] = 1
    step: int
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. keep: how many of the newest stay; the best one stays besides."""

    store: Store
    keep: int

    def commit(self, state: RunState, save: Callable[[Path], None], *, guard: Callable[[], None]) -> None:
        """Writes a checkpoint; it counts from the moment its manifest is there.

        save: writes the backend's files into an empty local folder. guard: raises if another attempt has taken the run over; asked
        last, right before the manifest.

        Raises:
            StorageFullError: no room; what was written is no checkpoint.
        """
        prefix = folder_of(state.order.step)
        self._remove(prefix)
        with tempfile.TemporaryDirectory(prefix="draf-checkpoint-") as temporary:
            folder = Path(temporary)
            with room(folder):
                save(folder)
                (folder / STATE).write_bytes(canonical_json(state))
            files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
            records = {name: FileRecord(size_bytes=path.stat().st_size, sha256=sha256_of(path)) for name, path in files.items()}
            for name, path in files.items():
                self.store.upload(f"{prefix}/{name}", path)
        guard()
        manifest = CheckpointManifest(step=state.order.step, files=records)
        self.store.write(f"{prefix}/{MANIFEST}", canonical_json(manifest))

    def steps(self) -> list[int]:
        """Steps of which there is a manifest, oldest first; whether their files are good is not known yet."""
        found = (path.split("/") for path in self.store.list(FOLDER))
        return sorted(int(parts[-2].removeprefix("step-")) for parts in found if parts[-1] == MANIFEST)

    @contextmanager
    def opened(self, step: int) -> Iterator[Path]:
        """A local folder with the files of a checkpoint, every one verified; gone afterwards.

        Raises:
            DataError: a file is missing or is not what the manifest says; the message names it.
        """
        prefix = folder_of(step)
        manifest = self._manifest(prefix)
        with tempfile.TemporaryDirectory(prefix="draf-checkpoint-") as temporary:
            for name, record in manifest.files.items():
                target = Path(temporary, name)
                data = self._verified(f"{prefix}/{name}", record)
                with room(Path(temporary)):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)
            yield Path(temporary)

    def state_in(self, folder: Path, step: int) -> RunState:
        """state.json of an opened checkpoint.

        Raises:
            DataError: it can't be read.
        """
        return _parse(RunState, (folder / STATE).read_bytes(), self.store.where(f"{folder_of(step)}/{STATE}"))

    @contextmanager
    def newest(self, warn: Callable[[str], None]) -> Iterator[tuple[RunState, Path] | None]:
        """The newest checkpoint that is good, opened; None where the run has none yet. `warn` hears of every broken one.

        Raises:
            DataError: there are checkpoints and none is good.
        """
        steps = self.steps()
        with ExitStack() as stack:
            for step in reversed(steps):
                try:
                    folder = stack.enter_context(self.opened(step))
                    state = self.state_in(folder, step)
                except DataError as error:
                    warn(str(error))
                    continue
                yield state, folder
                return
        if steps:
            where = f"{self.store.url}/{FOLDER}"
            found = f"{len(steps)}, all broken"
            raise DataError(explain(where, expected="a good checkpoint", found=found, remedy="Start anew with --fresh."))
        yield None

    def prune(self, best_step: int | None) -> None:
        """Removes all but the newest `keep` and the best."""
        for step in self.steps()[: -self.keep]:
            if step != best_step:
                self._remove(folder_of(step))

    def discard_past(self, step: int) -> None:
        """Removes every checkpoint past the one that a run continues from, and all that were never finished.

        Those past it are broken. Left there they would count as the newest, and `prune` would remove the good ones instead.
        """
        stay = {folder_of(there) for there in self.steps() if there <= step}
        found = {"/".join(path.split("/")[:2]) for path in self.store.list(FOLDER) if path.count("/") > 1}
        for prefix in sorted(found - stay):
            self._remove(prefix)

    def _manifest(self, prefix: str) -> CheckpointManifest:
        path = f"{prefix}/{MANIFEST}"
        return _parse(CheckpointManifest, self.store.read(path), self.store.where(path))

    def _verified(self, path: str, record: FileRecord) -> bytes:
        if not self.store.exists(path):
            raise DataError(_broken(self.store.where(path), "nothing"))
        data = self.store.read(path)
        if len(data) != record.size_bytes:
            raise DataError(_broken(self.store.where(path), f"{len(data)} bytes instead of {record.size_bytes}"))
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise DataError(_broken(self.store.where(path), "other bytes"))
        return data

    def _remove(self, prefix: str) -> None:
        # The manifest goes first: what is half removed must not look like a checkpoint.
        for path in sorted(self.store.list(prefix), key=lambda path: not path.endswith(f"/{MANIFEST}")):
            self.store.delete(path)
        local = self.store.local_path(prefix)
        if local is not None and local.is_dir():
            shutil.rmtree(local)


def folder_of(step: int) -> str:
    """Where the checkpoint of a step lies in the run folder."""
    return f"{FOLDER}/step-{step:08d}"


def sha256_of(path: Path) -> str:
    """sha256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _broken(where: str, found: str) -> str:
    return explain(where, expected="what the checkpoint's manifest says", found=found, remedy="This checkpoint is not used.")


def _parse(model: type[RecordT], data: bytes, where: str) -> RecordT:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise DataError(_broken(where, "something that can't be read")) from error
