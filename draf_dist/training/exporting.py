"""The product of a run: the weights of its best validation, in the form in which others take them."""

from draf_dist.errors import DataError, explain
from draf_dist.protocols.names import CHECKPOINTS
from draf_dist.training.run_folder import MODEL, RunFolder
from draf_dist.training.stage import Stage


def export_best(folder: RunFolder, stage: Stage, step: int) -> None:
    """Writes model/ from the checkpoint of a step, whoever saved it; called by one process.

    Raises:
        DataError: that checkpoint is broken.
    """
    for name, content in _files(folder, stage, step).items():
        folder.store.write(f"{MODEL}/{name}", content)


def _files(folder: RunFolder, stage: Stage, step: int) -> dict[str, bytes]:
    try:
        return stage.export(folder.checkpoints.at(step).tensors.weights())
    except DataError as error:
        # Nothing can bring them back but training again, so no later call of the same command would get further.
        where = f"{folder.store.where(CHECKPOINTS)}: step {step}"
        remedy = "Start anew with --fresh: the same job gives the same weights."
        found = f"a broken checkpoint ({error})"
        raise DataError(explain(where, expected="the weights of the best validation", found=found, remedy=remedy)) from error
