"""Moments of a run at which a process of it may be killed: see disturbed_runs."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from disturbed_runs import WORKERS, DisturbedRun, Seen, held


@dataclass(frozen=True)
class Moment:
    """When a process is killed. wait: until then; gives the process, and what it was doing. before_step: of the next attempt."""

    wait: Callable[[DisturbedRun], tuple[int, str]]
    before_step: bool = False


def while_starting(draw: random.Random) -> Moment:
    """Somewhere between the start of the ranks' processes and their first steps: imports, joining, restoring."""
    delay, rank = draw.uniform(0, 4), draw.randrange(WORKERS)

    def wait(run: DisturbedRun) -> tuple[int, str]:
        pids = _new_ranks(run)
        time.sleep(delay)
        return pids[rank], f"a worker, {delay:.1f} s after it was started"

    return Moment(wait, before_step=True)


def while_launching(draw: random.Random) -> Moment:
    """While Ray Train hands the ranks their function, which takes it seconds of imports."""
    rank = draw.randrange(WORKERS)

    def wait(run: DisturbedRun) -> tuple[int, str]:
        _new_ranks(run)
        launching = run.until(lambda: [pid for pid in run.rank_processes() if _does(pid, "run_train_fn")])
        return launching[rank % len(launching)], "a worker, while its function is launched"

    return Moment(wait, before_step=True)


def while_restoring(draw: random.Random) -> Moment:
    """With the first request for a file of a checkpoint; after another failure, that is."""
    rank = draw.randrange(WORKERS)

    def wait(run: DisturbedRun) -> tuple[int, str]:
        pids = _new_ranks(run)
        with held(run, "GET", f"{run.name}/checkpoints/") as arrived:
            run.until(arrived)
        return pids[rank], "a worker, while it looks for a checkpoint"

    return Moment(wait, before_step=True)


def in_step(draw: random.Random, step: int) -> Moment:
    """A step that has begun and is not done; this one or the first one after it that is seen."""
    rank, delay = draw.randrange(WORKERS), draw.uniform(0, 0.02)

    def begun(run: DisturbedRun) -> Seen | None:
        seen = run.newest(rank)
        return seen if seen is not None and seen.begun >= step and seen.done < seen.begun else None

    def wait(run: DisturbedRun) -> tuple[int, str]:
        seen = run.until(lambda: begun(run))
        time.sleep(delay)
        return seen.pid, f"rank {rank}, in step {seen.begun}"

    return Moment(wait)


def in_validation(draw: random.Random, step: int) -> Moment:
    """After the last step of an epoch, before the next epoch's first."""
    rank, delay = draw.randrange(WORKERS), draw.uniform(0, 0.1)

    def validates(run: DisturbedRun) -> Seen | None:
        seen, of = run.newest(rank), run.place.epoch_steps
        return seen if seen is not None and seen.done >= step and seen.done % of == 0 and seen.begun == seen.done else None

    def wait(run: DisturbedRun) -> tuple[int, str]:
        seen = run.until(lambda: validates(run))
        time.sleep(delay)
        return seen.pid, f"rank {rank}, in validation after step {seen.done}"

    return Moment(wait)


def at_put(draw: random.Random, step: int, doing: str, key: str) -> Moment:
    """With the first such file that is written after that step; `key` is a part of its path."""
    rank = draw.randrange(WORKERS)

    def wait(run: DisturbedRun) -> tuple[int, str]:
        seen = run.until(lambda: run.trains(step))
        pids = {each.rank: each.pid for each in run.seen() if each.attempt == seen.attempt}
        with held(run, "PUT", key) as arrived:
            run.until(arrived)
        return pids[rank], f"rank {rank}, {doing}"

    return Moment(wait)


def _does(pid: int, task: str) -> bool:
    """Whether a rank's process names this task of its actor as the one in hand, as Ray has it do."""
    with suppress(OSError):
        return task in Path(f"/proc/{pid}/cmdline").read_text()
    return False


def _new_ranks(run: DisturbedRun) -> list[int]:
    return run.until(lambda: found if len(found := run.rank_processes()) >= WORKERS else None)
