"""Blocks of steps in one process, a plain torch loop's and those of `draf train` in turn: what the overhead benchmark pairs."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console

from draf_dist.data.release import open_release
from draf_dist.errors import InterruptedRunError
from draf_dist.launch.ray_desk import Desk, DeskStop
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import load_job
from draf_dist.training.pin import pin
from draf_dist.training.run import ONE_PROCESS, StopRequest, attempt
from draf_dist.training.run_folder import open_run
from draf_dist.training.stages import build_stage

JOB = Path(__file__).resolve().parent.parent / "jobs" / "finetune_synth.yaml"
# Wider than the demo's: a step of a few hundred milliseconds.
ENCODER = "{kind: image2d, widths: [24, 48, 96], dropout: 0.05, projection_dropout: 0.1}"
BATCH = 64
# The first of a block finds caches that the other loop has filled.
LEFT_OUT = 1


@dataclass(frozen=True)
class Blocks:
    """What to measure: a run that was begun, its settings, and so many pairs of blocks of so many steps. desk: the driver's."""

    run: str
    settings: dict[str, object]
    desk: Desk
    pairs: int
    steps: int


def job_of(settings: dict[str, object]) -> FinetuneJob:
    """The job, with the release pinned."""
    job = pin(load_job(JOB, [f"{name}={value}" for name, value in settings.items()]))
    assert isinstance(job, FinetuneJob)
    return job


def plain_steps(job: FinetuneJob, steps: int) -> Iterator[float]:
    """The loop that one would write by hand: seconds of every step, waiting for its batch included, but for an epoch's last one."""
    torch.set_num_threads(1)
    stage = build_stage(job, open_release(job.release), ONE_PROCESS)
    rules, model = stage.rules(ONE_PROCESS), stage.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.optimizer.learning_rate, weight_decay=job.optimizer.weight_decay)
    model.train()
    began = time.perf_counter()
    for step, batch in stage.loader(ONE_PROCESS).batches(0, steps):
        prepared = rules.prepare(batch)
        terms = stage.objective(model, prepared, rules.keys(prepared))
        loss = torch.stack([term.scale * term.numerator / term.weight.clamp(min=1.0) for term in terms.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        assert job.optimizer.clip_norm is not None
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rules.learning_rate(step)
        optimizer.step()
        # The last batch of an epoch may be a short one.
        if (step + 1) % stage.plan.order.steps_per_epoch:
            yield time.perf_counter() - began
        began = time.perf_counter()


@dataclass
class Turns:
    """What a run asks after every step whether it is to stop: whenever a block of its steps is full, the plain loop has its turn.

    So all that the run does from step to step is timed, and not only what it times itself.
    """

    stop: StopRequest
    plain: Iterator[float]
    steps_per_epoch: int
    pairs: int
    steps: int
    found: list[tuple[float, float]] = field(default_factory=list)
    _ours: list[float] = field(default_factory=list)
    _num_steps: int = 0
    _since: float | None = None

    @property
    def requested(self) -> str | None:
        """Ends the run when all pairs are measured."""
        reason = self.stop.requested
        if not torch.is_grad_enabled():
            # Asked between two batches of a validation.
            return reason
        self._num_steps += 1
        ends_epoch = self._num_steps % self.steps_per_epoch == 0
        if self._since is not None and not ends_epoch:
            self._ours.append(time.perf_counter() - self._since)
        if len(self._ours) == self.steps:
            self._other_turn()
        # After an epoch comes validation.
        self._since = None if ends_epoch else time.perf_counter()
        return "measured" if len(self.found) == self.pairs else reason

    def _other_turn(self) -> None:
        # By hand one would not ask for operators without races.
        mode = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("default")
        plain = list(islice(self.plain, self.steps))
        torch.set_deterministic_debug_mode(mode)
        pair = statistics.mean(plain[LEFT_OUT:]), statistics.mean(self._ours[LEFT_OUT:])
        self.found.append(pair)
        self._ours.clear()


def measure(blocks: Blocks) -> list[tuple[float, float]]:
    """In the worker: seconds a step of (plain, ours) in every pair of blocks."""
    from draf_dist.launch.cores import decode_threads_of
    from draf_dist.training.deepspeed_engine import DeepSpeedRanks

    job = job_of(blocks.settings)
    backend = DeepSpeedRanks(DeepSpeedConfig(), torch.device("cpu"), decode_threads=decode_threads_of(1))
    stage = build_stage(job, open_release(job.release), backend)
    plain = plain_steps(job, 2 * (blocks.pairs + 1) * blocks.steps)
    # The first steps of a process get its memory.
    list(islice(plain, blocks.steps))
    turns = Turns(DeskStop(blocks.desk), plain, stage.plan.order.steps_per_epoch, blocks.pairs, blocks.steps)
    try:
        attempt(open_run(blocks.run).url, backend, Console(quiet=True), turns)
    except InterruptedRunError:
        return turns.found
    raise RuntimeError(f"{blocks.run} ended before all pairs were measured: more epochs are needed")


def of_blocks(blocks: Blocks) -> Callable[[], list[tuple[float, float]]]:
    """What Ray Train is given."""
    return partial(measure, blocks)
