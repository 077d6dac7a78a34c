"""The product of a run in the form in which others take it: the weights of its best validation, or of any checkpoint."""

from dataclasses import dataclass

from draf_dist.data.release import open_release
from draf_dist.errors import DataError, SpecError, explain
from draf_dist.protocols.names import CHECKPOINTS
from draf_dist.storage import open_store
from draf_dist.training.run_folder import MODEL, RunFolder, open_run
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


def export_checkpoint(run_url: str, step: int | None, out: str) -> Exported:
    """Writes the files of model/ from the checkpoint of a step, None for the newest, into a folder of any store.

    The run may be finished or not; nothing of it is written.

    Raises:
        SpecError: no such run, no checkpoint of that step, or the release is gone.
        DataError: the checkpoint is broken.
    """
    folder = open_run(run_url)
    saved = folder.checkpoints.steps()
    chosen = max(saved, default=None) if step is None else step
    if chosen is None or chosen not in saved:
        expected = "a run with checkpoints" if step is None else f"a checkpoint at step {step}"
        found = f"some at {', '.join(map(str, saved))}" if saved else "none"
        raise SpecError(explain(folder.url, expected=expected, found=found, remedy="See draf run show."))
    stage = build_stage(folder.job, open_release(folder.job.release), OneProcess())
    files, store = stage.export(folder.checkpoints.at(chosen).tensors.weights()), open_store(out)
    for name, content in files.items():
        store.write(name, content)
    return Exported(chosen, tuple(files))


def _files(folder: RunFolder, stage: Stage, step: int) -> dict[str, bytes]:
    try:
        return stage.export(folder.checkpoints.at(step).tensors.weights())
    except DataError as error:
        # Nothing can bring them back but training again, so no later call of the same command would get further.
        where = f"{folder.store.where(CHECKPOINTS)}: step {step}"
        remedy = "Start anew with --fresh: the same job gives the same weights."
        found = f"a broken checkpoint ({error})"
        raise DataError(explain(where, expected="the weights of the best validation", found=found, remedy=remedy)) from error
