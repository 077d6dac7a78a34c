"""The product of a run in the form in which others take it: the weights of its best validation, or of any checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from draf_dist.data.release import open_release
from draf_dist.errors import DataError, SpecError, UnreachableError, explain
from draf_dist.protocols.names import CHECKPOINTS
from draf_dist.storage import open_store
from draf_dist.training.checkpoint import Checkpoint
from draf_dist.training.ledger import FILE as LEDGER
from draf_dist.training.restoring import restore
from draf_dist.training.run_folder import JOB, MODEL, RunFolder, open_run
from draf_dist.training.stage import Stage
from draf_dist.training.stages import build_stage
from draf_dist.training.torch_engine import OneProcess


def export_best(folder: RunFolder, stage: Stage, step: int) -> None:
    """Writes model/ from the checkpoint of a step, whoever saved it; called by one process.

    Raises:
        DataError: that checkpoint is broken.
    """
    for name, content in _files(folder, stage, step).items():
        folder.store.write(f"{MODEL}/{name}", content)


@dataclass(frozen=True)
class Exported:
    """A checkpoint that was exported: steps done there, and the names of the files."""

    step: int
    files: tuple[str, ...]


def export_checkpoint(run_url: str, step: int | None, out: str, warn: Callable[[str], None]) -> Exported:
    """Writes the files of model/ from the checkpoint of a step, None for the newest good one, into a folder of any store.

    The run may be finished or not; nothing of it is written. warn: hears of every newer checkpoint that is broken.

    Raises:
        SpecError: no such run, no checkpoint of that step, the release is gone, or the folder is a run's or lies within one.
        DataError: the checkpoint is broken, or all are.
    """
    folder, store = open_run(run_url), open_store(out)
    _refuse_run(store.url)
    checkpoint = _newest(folder, warn) if step is None else _at(folder, step)
    stage = build_stage(folder.job, open_release(folder.job.release), OneProcess())
    files = stage.export(checkpoint.tensors.weights())
    for name, content in files.items():
        store.write(name, content)
    return Exported(checkpoint.state.order.step, tuple(files))


def _refuse_run(url: str) -> None:
    here, *above = _and_above(url)
    # A job.yaml of one's own may lie anywhere above; that of a run that has begun has a ledger beside it.
    run = next((place for place in above if _holds(place, JOB, LEDGER)), None)
    if _holds(here, JOB) or run is not None:
        found = f"{run}, a run, above it" if run else "a run"
        remedy = "Choose another --out: a run's files stay as it wrote them."
        raise SpecError(explain(url, expected="a folder in no run folder", found=found, remedy=remedy))


def _and_above(url: str) -> list[str]:
    """The URL of a folder and those of the folders that it lies in, up to the bucket or the root."""
    if not url.startswith("s3://"):
        folder = Path(url).resolve()
        return [str(folder), *map(str, folder.parents)]
    bucket, *parts = url.removeprefix("s3://").split("/")
    return ["/".join(["s3:/", bucket, *parts[:count]]) for count in range(len(parts), -1, -1)]


def _holds(url: str, *names: str) -> bool:
    try:
        store = open_store(url)
        return all(map(store.exists, names))
    except UnreachableError:
        # Rights may end at a prefix. Whether the folder itself can be written shows when it is.
        return False


def _newest(folder: RunFolder, warn: Callable[[str], None]) -> Checkpoint:
    found = restore(folder.checkpoints, folder.checkpoints.ids(), OneProcess(), warn).checkpoint
    if found is None:
        raise SpecError(explain(folder.url, expected="a run with checkpoints", found="none", remedy="See draf run show."))
    return found


def _at(folder: RunFolder, step: int) -> Checkpoint:
    saved = folder.checkpoints.steps()
    others = ", ".join(str(each) for each in saved if each != step)
    if step not in saved:
        found = f"some at {others}" if others else "none"
        raise SpecError(explain(folder.url, expected=f"a checkpoint at step {step}", found=found, remedy="See draf run show."))
    try:
        return folder.checkpoints.at(step)
    except DataError as error:
        remedy = f"There are others at {others}." if others else "There is no other."
        found = f"a broken one ({error})"
        raise DataError(explain(folder.url, expected=f"a good checkpoint at step {step}", found=found, remedy=remedy)) from error


def _files(folder: RunFolder, stage: Stage, step: int) -> dict[str, bytes]:
    try:
        return stage.export(folder.checkpoints.at(step).tensors.weights())
    except DataError as error:
        where = f"{folder.store.where(CHECKPOINTS)}: step {step}"
        remedy = "The same command goes back to before it: the same steps give the same weights."
        found = f"a broken checkpoint ({error})"
        raise DataError(explain(where, expected="the weights of the best validation", found=found, remedy=remedy)) from error
