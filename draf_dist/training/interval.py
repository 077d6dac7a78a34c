"""How often to save: after Young and Daly, from what a run has measured.

C: seconds that a save costs training; L: seconds from then until it is durable, behind training; R: seconds from a failure to the
next step; M: mean seconds between failures, which come independently of one another (an exponential law). Of an interval tau:

  Young (1974), A first order approximation to the optimum checkpoint interval, CACM 17(9):      tau = sqrt(2 C M)
  Daly (2006), A higher order estimate of the optimum checkpoint interval, FGCS 22(3):
        tau = sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C   where C < 2 M, else M
  and what an interval then takes in the mean, failures during restarts included (Daly):
        T = M exp(R / M) (exp((tau + C) / M) - 1),   so that the waste is 1 - tau / T

The last one has its least waste at tau = M (1 + W(-exp(-1 - C / M))), W being Lambert's function; Daly's is within 0.1 % of it for
C < M / 8. Both are of saves that training waits for. Here it goes on while one is on its way: one that fails meanwhile goes back an
interval further, which happens with probability L / tau and costs tau, so L in the mean: L adds to R. One save is on its way at a
time, so the next one waits for it: C grows by L - tau where tau < L, and no such interval is better than L.

A run saves after every `every_steps` of an epoch and at its end, so an epoch is ceil(steps / every_steps) intervals, of which the
last may be shorter. Its waste is what all of them take in the mean together.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from draf_dist.errors import DataError, explain
from draf_dist.training.goodput import goodput
from draf_dist.training.journal import Line
from draf_dist.training.run_folder import RunFolder

# 7.9 h between failures of 1,024 GPUs (Kokolis et al. 2024, arXiv 2410.21680, 150 million A100 hours); of one 1,024 times as long.
PUBLISHED_RANK_S = 7.9 * 3600 * 1024
DAY_S = 86_400.0
Source = Literal["given", "measured", "published"]


@dataclass(frozen=True)
class Costs:
    """Seconds of C, L, R and of a step, as a run has measured them.

    C is save_s, what training waited for, and slowed_s, what steps took longer while a save was on its way: medians over `saves`.
    durable_s: L. restart_s: mean over `restarts`, or how long the first start took where there were none.
    """

    save_s: float
    slowed_s: float
    durable_s: float
    restart_s: float
    step_s: float
    saves: int
    restarts: int


@dataclass(frozen=True)
class Advice:
    """How often to save. every_steps: within an epoch; epoch_saves: how many an epoch has then, the one at its end included.

    waste: the share of the time that saves and failures cost with it. job_every_steps, job_epoch_saves, job_waste: of the job as it
    is. mtbf_s, mtbf_source: mean seconds between failures, and who says so; failures: how many it rests on, where it was measured.
    """

    every_steps: int
    epoch_saves: int
    waste: float
    job_every_steps: int
    job_epoch_saves: int
    job_waste: float
    mtbf_s: float
    mtbf_source: Source
    failures: int
    costs: Costs


def young_s(save_s: float, mtbf_s: float) -> float:
    """Seconds between saves, to first order."""
    return math.sqrt(2 * save_s * mtbf_s)


def daly_s(save_s: float, mtbf_s: float) -> float:
    """Seconds of steps between saves, to higher order."""
    ratio = save_s / (2 * mtbf_s)
    return young_s(save_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s if ratio < 1 else mtbf_s


def waste(interval_s: float, save_s: float, durable_s: float, restart_s: float, mtbf_s: float) -> float:
    """Share of the time that is not used, in [0, 1], where all intervals are equally long."""
    return 1 - interval_s / _takes_s(interval_s, save_s, durable_s, restart_s, mtbf_s)


def epoch_waste(steps: int, every: int, costs: Costs, mtbf_s: float) -> float:
    """The same of an epoch of so many steps that is saved after `every` of them and at its end; every <= steps."""
    last = steps - (epoch_saves(steps, every) - 1) * every
    whole_s, last_s = (
        _takes_s(part * costs.step_s, costs.save_s + costs.slowed_s, costs.durable_s, costs.restart_s, mtbf_s)
        for part in (every, last)
    )
    # Not 0 * inf.
    before_s = (steps - last) // every * whole_s if last < steps else 0.0
    return 1 - steps * costs.step_s / (before_s + last_s)


def epoch_saves(steps: int, every: int) -> int:
    """How many saves an epoch has, the one at its end included."""
    return math.ceil(steps / every)


def _takes_s(interval_s: float, save_s: float, durable_s: float, restart_s: float, mtbf_s: float) -> float:
    """Seconds that an interval takes in the mean."""
    waits_s = max(durable_s - interval_s, 0.0)
    exponents = (restart_s + durable_s) / mtbf_s, (interval_s + save_s + waits_s) / mtbf_s
    # Nothing is ever finished.
    if max(exponents) > 300:
        return math.inf
    return mtbf_s * math.exp(exponents[0]) * math.expm1(exponents[1])


def advise(
    measured: RunFolder, *, every_steps: int, steps_per_epoch: int, world: int, failures_per_day: float | None = None
) -> Advice:
    """How often to save in a job that saves after every `every_steps` of an epoch and at its end, from an earlier run like it.

    failures_per_day: of the whole job; if None, as often as that run failed, and if it never did, as published for `world` GPUs.

    Raises:
        DataError: that run has not saved.
    """
    lines = measured.ledger()
    costs = _costs(measured, lines)
    mtbf_s, source, failures = _between_failures(lines, world, failures_per_day)
    best, own = recommended(steps_per_epoch, costs, mtbf_s), min(every_steps, steps_per_epoch)
    return Advice(
        every_steps=best,
        epoch_saves=epoch_saves(steps_per_epoch, best),
        waste=epoch_waste(steps_per_epoch, best, costs, mtbf_s),
        job_every_steps=own,
        job_epoch_saves=epoch_saves(steps_per_epoch, own),
        job_waste=epoch_waste(steps_per_epoch, own, costs, mtbf_s),
        mtbf_s=mtbf_s,
        mtbf_source=source,
        failures=failures,
        costs=costs,
    )


def recommended(steps: int, costs: Costs, mtbf_s: float) -> int:
    """After how many steps of an epoch of so many to save.

    Of a few intervals the one with the least waste: the best one (Daly's, but no shorter than L), and those around it that divide
    the epoch most evenly.
    """
    best = max(daly_s(costs.save_s + costs.slowed_s, mtbf_s), costs.durable_s) / costs.step_s
    saves = math.floor(steps / best)
    near = {math.ceil(steps / max(saves + more, 1)) for more in (-1, 0, 1)}
    near.add(min(max(round(best), 1), steps))
    return min(sorted(near, reverse=True), key=lambda every: epoch_waste(steps, every, costs, mtbf_s))


def _between_failures(lines: Sequence[Line], world: int, failures_per_day: float | None) -> tuple[float, Source, int]:
    if failures_per_day is not None:
        return DAY_S / failures_per_day, "given", 0
    found = goodput(lines)
    if found.mtbf_s is None:
        return PUBLISHED_RANK_S / world, "published", 0
    return found.mtbf_s, "measured", len(found.accidents)


def _costs(folder: RunFolder, lines: Sequence[Line]) -> Costs:
    saves = [line for line in lines if line["event"] == "save"]
    waits = list(_waits(lines))
    steps = [line for line in folder.metrics() if line["event"] == "step"]
    if not saves or not waits or not steps:
        remedy = "Name one that has saved at least twice, without an interruption in between."
        raise DataError(explain(folder.url, expected="a run that has measured its saves", found="none", remedy=remedy))
    seconds = [line["wait_s"] + line["compute_s"] for line in steps]
    restarts = [failure.restart_s for failure in goodput(lines).accidents if failure.restart_s]
    return Costs(
        save_s=statistics.median(waits),
        slowed_s=_slowed_s([line["step"] for line in steps], seconds, saves),
        durable_s=statistics.median(map(_behind, saves)),
        restart_s=statistics.fmean(restarts) if restarts else goodput(lines).seconds["startup"],
        step_s=statistics.fmean(seconds),
        saves=len(waits),
        restarts=len(restarts),
    )


def _waits(lines: Iterable[Line]) -> Iterable[float]:
    """Seconds that training waited for a save: what is booked between two commits of an attempt, less the wait for an older one."""
    lines = list(lines)
    behind = {(line["attempt"], line["step"]): _behind(line) for line in lines if line["event"] == "save"}
    first = True
    for line in lines:
        if line["event"] == "commit" and not first:
            waited = line["seconds"].get("checkpoint", 0.0)
            passed = sum(line["seconds"].values()) - waited
            yield waited - min(max(behind.get((line["attempt"], line["start"]), 0.0) - passed, 0.0), waited)
        first = line["event"] == "attempt" or (first and line["event"] != "commit")


def _behind(save: Line) -> float:
    # Ledgers of before have no seconds of the books.
    seconds: float = save.get("books_s", 0.0) + save["upload_s"] + save["commit_s"]
    return seconds


def _slowed_s(steps: Sequence[int], seconds: Sequence[float], saves: Iterable[Line]) -> float:
    """What the steps took longer than usual that were made while a save was on its way: median over saves."""
    usual = statistics.median(seconds)
    after = {step: place + 1 for place, step in enumerate(steps)}
    return statistics.median(_excess(seconds[after.get(save["step"], len(steps)) :], usual, _behind(save)) for save in saves)


def _excess(seconds: Iterable[float], usual: float, until_s: float) -> float:
    passed = excess = 0.0
    for each in seconds:
        if passed >= until_s:
            break
        passed, excess = passed + each, excess + each - usual
    return max(excess, 0.0)
