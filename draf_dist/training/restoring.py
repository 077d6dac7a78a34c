"""Going on from the newest good checkpoint: all ranks read it at the same time, and agree on which one it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from draf_dist.errors import DataError, explain
from draf_dist.protocols.names import CHECKPOINTS, CheckpointName, checkpoint_name
from draf_dist.training.backend import Backend, EngineFiles
from draf_dist.training.checkpoint import Checkpoint, Checkpoints
from draf_dist.training.run_folder import RunFolder
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import TrainState


@dataclass(frozen=True)
class Restored:
    """What an attempt goes on from. checkpoint: None where the run has none yet; broken: ids of newer ones that can't be used."""

    checkpoint: Checkpoint | None
    broken: tuple[str, ...] = ()


def go_on(
    folder: RunFolder, inherits: Sequence[str], files: EngineFiles, backend: Backend, warn: Callable[[str], None]
) -> tuple[TrainState, tuple[str, ...]]:
    """Loads the newest good checkpoint, if there is one; where the run stands then, and the ids of those that are broken.

    Raises:
        DataError: see restore; or it is one of another job.
    """
    found = restore(folder.checkpoints, inherits, backend, warn)
    if found.checkpoint is None:
        return TrainState(0, EarlyStopping(patience=folder.job.patience)), found.broken
    stored = found.checkpoint.state
    if stored.job_sha256 != folder.job.sha256:
        where, remedy = folder.store.where(CHECKPOINTS), "Start anew with --fresh."
        raise DataError(explain(where, expected="a checkpoint of this job", found="another job's", remedy=remedy))
    files.load(found.checkpoint.tensors)
    return TrainState(stored.order.step, stored.stopping), found.broken


def restore(checkpoints: Checkpoints, candidates: Sequence[str], backend: Backend, warn: Callable[[str], None]) -> Restored:
    """The newest of some checkpoints that is good on every rank. Every rank calls it.

    candidates: ids, oldest first, as the first rank has them; those of the other ranks are not looked at. warn: hears of every
    broken one on the rank that found it so, and on the first.

    Raises:
        DataError: there are checkpoints and none is good, or only such as earlier versions wrote.
    """
    broken: list[str] = []
    for checkpoint in reversed(_of_first(candidates, backend)):
        found = _read(checkpoints, checkpoint, warn)
        good = torch.tensor([float(found is not None)], device=backend.device)
        if int(backend.reduce(good)) == backend.world:
            return Restored(found, tuple(broken))
        if found is not None and backend.rank == 0:
            where = checkpoints.store.where(f"{CHECKPOINTS}/{checkpoint}")
            warn(explain(where, expected="a good checkpoint", found="one that another rank can't read", remedy="It is not used."))
        broken.append(checkpoint)
    if broken:
        where, number = checkpoints.store.where(CHECKPOINTS), f"{len(broken)}, all broken"
        raise DataError(explain(where, expected="a good checkpoint", found=number, remedy="Start anew with --fresh."))
    if backend.rank == 0:
        checkpoints.refuse_earlier_format()
    return Restored(None)


def _of_first(checkpoints: Sequence[str], backend: Backend) -> list[str]:
    """The first rank's ids, on every rank."""
    rows = [list(checkpoint_name(checkpoint)) for checkpoint in checkpoints] if backend.rank == 0 else []
    mine = torch.tensor(rows, dtype=torch.int64, device=backend.device).reshape(-1, len(CheckpointName._fields))
    return [CheckpointName(*row).id for row in backend.gather(mine).tolist()]


def _read(checkpoints: Checkpoints, checkpoint: str, warn: Callable[[str], None]) -> Checkpoint | None:
    try:
        return checkpoints.read(checkpoint)
    except DataError as error:
        warn(str(error))
        return None
