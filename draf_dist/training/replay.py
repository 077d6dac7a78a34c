"""One step of a run again, in one process: its loss and gradient, and what every row of its batch brings to them."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

from torch import Tensor

from draf_dist.data.order import rank_entries
from draf_dist.data.release import open_release
from draf_dist.errors import DataError, SpecError, explain
from draf_dist.schema.batch import Batch
from draf_dist.schema.identity import uid_name
from draf_dist.training.backend import EngineFiles
from draf_dist.training.engine import Engine
from draf_dist.training.journal import Line
from draf_dist.training.ledger import effective_commits
from draf_dist.training.loop import CoupledObjective, Objective, StepReport, StepRules, first_look, train_steps
from draf_dist.training.repeatable import repeatable
from draf_dist.training.run_folder import RunFolder, open_run
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.stage import Stage, num_steps
from draf_dist.training.stages import build_stage
from draf_dist.training.state import TrainState
from draf_dist.training.torch_engine import OneProcess
from draf_dist.training.watch.health import Health

# Rows are summed in another order where there were several ranks.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class ReplayedRow:
    """One row of the batch. rank: that had it; terms: its mean of every term that counts it, before scaling.

    loss: its part of the loss of the batch: all rows together give the loss. None where rows can't be looked at one by one.
    """

    uid: str
    rank: int
    loss: float | None
    terms: dict[str, float]


@dataclass(frozen=True)
class Replay:
    """A step done again. start: steps done at the checkpoint that it went from, 0 for none; world: ranks that did it then.

    recorded: the line of metrics.jsonl, None where the step is not in it. difference: the largest relative one of the loss, its
    terms and the norm of the gradient, None where nothing is recorded. skipped: why the run left its update out.
    """

    url: str
    step: int
    start: int
    world: int
    loss: float
    terms: dict[str, float]
    gradient_norm: float
    rows: tuple[ReplayedRow, ...]
    recorded: Line | None
    difference: float | None
    skipped: str | None

    @property
    def agrees(self) -> bool | None:
        """Whether it is what was recorded: to the bit for a run of one process, else to TOLERANCE. None: nothing is recorded."""
        if self.difference is None:
            return None
        return self.difference <= (0.0 if self.world == 1 else TOLERANCE)


@dataclass(frozen=True)
class _Work:
    stage: Stage
    engine: Engine
    files: EngineFiles
    backend: OneProcess


def replay(
    run_url: str,
    step: int,
    *,
    warn: Callable[[str], None] = lambda message: None,
    told: Callable[[int, int], None] = lambda done, wanted: None,
) -> Replay:
    """Does a step of a run again, from the newest good checkpoint before it; nothing is written.

    step: as metrics.jsonl counts, from 1; also one that the run never finished. warn: hears of broken checkpoints. told: steps done
    and wanted.

    Raises:
        SpecError: no such run or step, or the release is gone.
        DataError: a broken shard.
    """
    folder = open_run(run_url)
    ledger, metrics = folder.ledger(), folder.metrics()
    world, threads = _place(ledger, step)
    backend = OneProcess(threads=threads)
    with repeatable(backend.threads, backend.device):
        stage = build_stage(folder.job, open_release(folder.job.release), backend)
        if not 1 <= step <= num_steps(stage):
            expected = f"a step from 1 to {num_steps(stage)}"
            raise SpecError(explain("--step", expected=expected, found=str(step), remedy="Steps count as in metrics.jsonl."))
        work = _Work(stage, *backend.start(stage.model, folder.job.optimizer), backend)
        start = _load(folder, work.files, step, warn)
        health = Health.at(None, ledger, metrics, start)
        skipped = health.skipped_at(step - 1)
        report, rows = _run(work, health.but_for(step - 1), start, step, told)
    recorded = next((line for line in metrics if line["event"] == "step" and line["step"] == step), None)
    return Replay(
        url=folder.url,
        step=step,
        start=start,
        world=world,
        loss=report.loss,
        terms=report.terms,
        gradient_norm=report.gradient_norm,
        rows=_placed(rows, stage, step, world),
        recorded=recorded,
        difference=None if recorded is None else _difference(report, recorded),
        skipped=None if skipped is None else skipped.why,
    )


def _place(ledger: list[Line], step: int) -> tuple[int, int]:
    """Ranks of the attempt that did a step, and threads of one operator; of the last one, where no commit has it."""
    attempts = {line["attempt"]: line for line in ledger if line["event"] == "attempt"}
    number = next((line["attempt"] for line in effective_commits(ledger) if line["start"] < step <= line["stop"]), None)
    found = attempts.get(number) or next(reversed(attempts.values()), {"world": 1, "threads": 1})
    return found["world"], found["threads"]


def saved_steps(folder: RunFolder) -> list[int]:
    """Steps done at the checkpoints of a run, oldest first."""
    return folder.checkpoints.steps()


def saved_tensors(folder: RunFolder, step: int) -> Mapping[str, Tensor]:
    """Every tensor of a checkpoint by name, whole.

    Raises:
        DataError: it is broken.
    """
    return folder.checkpoints.at(step).tensors


def _load(folder: RunFolder, files: EngineFiles, step: int, warn: Callable[[str], None]) -> int:
    """Restores the newest good checkpoint before a step; the steps done there, 0 where there is none."""
    for saved in reversed([saved for saved in saved_steps(folder) if saved < step]):
        try:
            files.load(folder.checkpoints.at(saved).tensors)
        except DataError as error:
            warn(str(error))
            continue
        return saved
    return 0


def _run(
    work: _Work, health: Health, start: int, step: int, told: Callable[[int, int], None]
) -> tuple[StepReport, list[ReplayedRow]]:
    """The steps up to one, and its rows as the weights before it see them."""
    stage, rows = work.stage, []
    rules = stage.rules(work.backend)

    def watched(batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        for number, batch in batches:
            if number == step - 1:
                rows.extend(_rows(work, rules, batch))
            yield number, batch

    state = TrainState(start, EarlyStopping(patience=1))
    with closing(stage.loader(work.backend).batches(start, step)) as batches:
        for report in train_steps(state, work.engine, watched(batches), stage.objective, rules, health):
            told(report.step - start, step - start)
    return report, rows


def _rows(work: _Work, rules: StepRules, batch: Batch) -> list[ReplayedRow]:
    """Every row by itself. rank: not known yet."""
    prepared, objective = rules.prepare(batch), work.stage.objective
    rows = [row for row in range(batch.num_rows) if batch.weight[row] > 0]
    uids = [uid_name(int(batch.uid[row])) for row in rows]
    if isinstance(objective, CoupledObjective):
        return [ReplayedRow(uid, 0, None, {}) for uid in uids]
    return [
        ReplayedRow(uid, 0, *found) for uid, found in zip(uids, _alone(work.engine, rules, objective, prepared, rows), strict=True)
    ]


def _alone(
    engine: Engine, rules: StepRules, objective: Objective, batch: Batch, rows: list[int]
) -> list[tuple[float, dict[str, float]]]:
    parts = [batch.rows(row, row + 1) for row in rows]
    with first_look(engine.module):
        found = [objective(engine.module, part, rules.keys(part)) for part in parts]
    weights = {name: sum(float(terms[name].weight) for terms in found) for name in found[0]}
    losses = [
        sum(term.scale * float(term.numerator) / weights[name] for name, term in terms.items() if weights[name] > 0)
        for terms in found
    ]
    means = [{name: float(term.numerator / term.weight) for name, term in terms.items() if term.weight > 0} for terms in found]
    return list(zip(losses, means, strict=True))


def _placed(rows: list[ReplayedRow], stage: Stage, step: int, world: int) -> tuple[ReplayedRow, ...]:
    """The rows with the ranks that had them, as far as none was left out as unusable."""
    num = stage.plan.num_entries(step - 1)
    size = stage.plan.order.batch_size
    ranks = [rank for rank in range(world) for _ in range(*rank_entries(num, size, rank, world).indices(num))]
    if len(ranks) != len(rows):
        return tuple(replace(row, rank=-1) for row in rows)
    return tuple(replace(row, rank=rank) for row, rank in zip(rows, ranks, strict=True))


def _difference(report: StepReport, recorded: Line) -> float:
    pairs = [(report.loss, recorded["loss"]), (report.gradient_norm, recorded["gradient_norm"])]
    pairs += [(report.terms.get(name, math.nan), value) for name, value in recorded["terms"].items()]
    return max(relative(found, expected) for found, expected in pairs)


def relative(found: float, expected: float) -> float:
    """How far two numbers are apart, as a share of the larger; 0 for equal ones and two NaN, infinite where one of them is none."""
    if found == expected or (math.isnan(found) and math.isnan(expected)):
        return 0.0
    if not (math.isfinite(found) and math.isfinite(expected)):
        return math.inf
    return abs(found - expected) / max(abs(found), abs(expected))
