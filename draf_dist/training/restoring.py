"""Going on from the newest checkpoint that serves: all ranks read it at the same time, and agree on which one it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from draf_dist.errors import DataError, explain
from draf_dist.protocols.attempts import of_step
from draf_dist.protocols.names import CHECKPOINTS, CheckpointName, checkpoint_name
from draf_dist.training.backend import Backend, EngineFiles
from draf_dist.training.checkpoint import Checkpoint, Checkpoints
from draf_dist.training.run_folder import RunFolder
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import RunState, TrainState
from draf_dist.training.watch.health import holds_skipped


@dataclass(frozen=True)
class Restored:
    """What an attempt goes on from. checkpoint: None where there is none; broken: ids of newer ones that can't be used."""

    checkpoint: Checkpoint | None
    broken: tuple[str, ...] = ()


def go_on(
    folder: RunFolder,
    inherits: Sequence[str],
    files: EngineFiles,
    backend: Backend,
    num_steps: int,
    warn: Callable[[str], None],
) -> tuple[TrainState, tuple[str, ...]]:
    """Loads the newest checkpoint that serves, if there is one; where the run stands then, and the ids of those that can't be used.

    One serves that is good, holds no update that has since been found to be skipped, and whose best checkpoint is good too.

    Raises:
        DataError: see restore; or it is one of another job.
    """
    candidates = _of_first(inherits, backend)
    # As the first rank reads it: a ledger that others read a moment later may say more.
    past = _of_first(_that_hold_skipped(folder, candidates) if backend.rank == 0 else [], backend)
    best = _Best(folder.checkpoints, candidates, backend, num_steps, warn)
    found = restore(folder.checkpoints, [each for each in candidates if each not in past], backend, warn, best.serves)
    unusable = (*past, *found.broken)
    if found.checkpoint is None:
        return TrainState(0, EarlyStopping(patience=folder.job.patience)), unusable
    stored = found.checkpoint.state
    if stored.job_sha256 != folder.job.sha256:
        where, remedy = folder.store.where(CHECKPOINTS), "Start anew with --fresh."
        raise DataError(explain(where, expected="a checkpoint of this job", found="another job's", remedy=remedy))
    files.load(found.checkpoint.tensors)
    return TrainState(stored.order.step, stored.stopping, stored.due), unusable


def restore(
    checkpoints: Checkpoints,
    candidates: Sequence[str],
    backend: Backend,
    warn: Callable[[str], None],
    serves: Callable[[str, RunState], bool] = lambda checkpoint, state: True,
) -> Restored:
    """The newest of some checkpoints that is good on every rank, and serves. Every rank calls it.

    candidates: ids, oldest first, as the first rank has them; those of the other ranks are not looked at. warn: hears of every
    broken one on the rank that found it so, and on the first. serves: asked of good ones, on all ranks, and the same there. None is
    found if there is none to choose from, or none serves.

    Raises:
        DataError: there are checkpoints and none is good, or only such as earlier versions wrote.
    """
    broken: list[str] = []
    any_good = False
    for checkpoint in reversed(_of_first(candidates, backend)):
        found = _read(checkpoints, checkpoint, warn)
        good = torch.tensor([float(found is not None)], device=backend.device)
        if int(backend.reduce(good)) == backend.world:
            assert found is not None
            any_good = True
            if serves(checkpoint, found.state):
                return Restored(found, tuple(broken))
        elif found is not None and backend.rank == 0:
            where = checkpoints.store.where(f"{CHECKPOINTS}/{checkpoint}")
            warn(explain(where, expected="a good checkpoint", found="one that another rank can't read", remedy="It is not used."))
        broken.append(checkpoint)
    if broken and not any_good:
        where, number = checkpoints.store.where(CHECKPOINTS), f"{len(broken)}, all broken"
        raise DataError(explain(where, expected="a good checkpoint", found=number, remedy="Start anew with --fresh."))
    if backend.rank == 0:
        checkpoints.refuse_earlier_format()
    return Restored(None, tuple(broken))


@dataclass
class _Best:
    """Looks whether the weights that a run would export at its end are there: from a checkpoint on they are never made again.

    Where they are not, the run goes back to before them. One that is not there at all has been replaced by a better one, which is
    met again from here on; unless the run ends here. candidates: ids, oldest first.
    """

    checkpoints: Checkpoints
    candidates: Sequence[str]
    backend: Backend
    num_steps: int
    warn: Callable[[str], None]
    _lost: dict[int, bool] = field(default_factory=dict)

    def serves(self, checkpoint: str, state: RunState) -> bool:
        """Whether the best checkpoint of a good one is good; asked of newer ones first. Only the first rank reads it."""
        best, step = state.stopping.best_step, state.order.step
        if best is None or best == step:
            return True
        over = not state.due and (step >= self.num_steps or state.stopping.exhausted)
        lost = float(self.backend.rank == 0 and self._is_lost(best, over))
        if not self.backend.reduce(torch.tensor([lost], device=self.backend.device)) > 0:
            return True
        if self.backend.rank == 0:
            where, found = self.checkpoints.store.where(f"{CHECKPOINTS}/{checkpoint}"), "a broken one, or none"
            remedy = f"It is not used: the run goes back to before step {best}."
            self.warn(explain(where, expected=f"a good checkpoint of the best step, {best}", found=found, remedy=remedy))
        return False

    def _is_lost(self, best: int, over: bool) -> bool:
        if best not in self._lost:
            there = of_step(tuple(self.candidates), best)
            if there is None and not over:
                return False
            self._lost[best] = there is None or _read(self.checkpoints, there, self.warn) is None
        return self._lost[best]


def _that_hold_skipped(folder: RunFolder, candidates: Sequence[str]) -> list[str]:
    """The candidates that go too far, as the ledger has it."""
    ledger = folder.ledger()
    named = ((each, checkpoint_name(each)) for each in candidates)
    return [each for each, name in named if holds_skipped(ledger, name.step, name.attempt)]


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
