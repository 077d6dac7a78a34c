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
interval further, which happens with probability L / tau and costs tau, so L in the mean: L adds to R. The interval is no
shorter than L, as one save is on its way at a time.
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
    """How often to save. every_steps: at least once in so many; waste: the share of the time that saves and failures cost with it.

    job_every_steps, job_waste: of the job as it is, which also saves after every epoch. mtbf_s, mtbf_source: mean seconds between
    failures, and who says so; failures: how many it rests on, where it was measured.
    """

    every_steps: int
    waste: float
    job_every_steps: int
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


def waste(interval_s: float, save_s: float, restart_s: float, mtbf_s: float) -> float:
    """Share of the time that is not used, in [0, 1]; restart_s with L."""
    exponent = (interval_s + save_s) / mtbf_s
    # Nothing is ever finished.
    if exponent > 700 or restart_s / mtbf_s > 700:
        return 1.0
    return 1 - interval_s / (mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1(exponent))


def advise(
    measured: RunFolder, *, every_steps: int, steps_per_epoch: int, world: int, failures_per_day: float | None = None
) -> Advice:
    """How often to save in a job that saves every `every_steps` and after every epoch, from an earlier run of the same kind.

    failures_per_day: of the whole job; if None, as often as that run failed, and if it never did, as published for `world` GPUs.

    Raises:
        DataError: that run has not saved.
    """
    lines = measured.ledger()
    costs = _costs(measured, lines)
    mtbf_s, source, failures = _between_failures(lines, world, failures_per_day)

    def wasted(steps: int) -> float:
        return waste(steps * costs.step_s, costs.save_s + costs.slowed_s, costs.restart_s + costs.durable_s, mtbf_s)

    best_s = max(daly_s(costs.save_s + costs.slowed_s, mtbf_s), costs.durable_s)
    best = min(max(round(best_s / costs.step_s), 1), steps_per_epoch)
    own = min(every_steps, steps_per_epoch)
    return Advice(best, wasted(best), own, wasted(own), mtbf_s, source, failures, costs)


def _between_failures(lines: Sequence[Line], world: int, failures_per_day: float | None) -> tuple[float, Source, int]:
    if failures_per_day is not None:
        return DAY_S / failures_per_day, "given", 0
    found = goodput(lines)
    if found.mtbf_s is None:
        return PUBLISHED_RANK_S / world, "published", 0
    return found.mtbf_s, "measured", len(found.failures)


def _costs(folder: RunFolder, lines: Sequence[Line]) -> Costs:
    saves = [line for line in lines if line["event"] == "save"]
    waits = list(_waits(lines))
    steps = [line for line in folder.metrics() if line["event"] == "step"]
    if not saves or not waits or not steps:
        remedy = "Name one that has saved at least twice, without an interruption in between."
        raise DataError(explain(folder.url, expected="a run that has measured its saves", found="none", remedy=remedy))
    seconds = [line["wait_s"] + line["compute_s"] for line in steps]
    restarts = [failure.restart_s for failure in goodput(lines).failures if failure.restart_s]
    return Costs(
        save_s=statistics.median(waits),
        slowed_s=_slowed_s([line["step"] for line in steps], seconds, saves),
        durable_s=statistics.median(_behind(line) for line in saves),
        restart_s=statistics.fmean(restarts) if restarts else goodput(lines).seconds["startup"],
        step_s=statistics.fmean(seconds),
        saves=len(waits),
        restarts=len(restarts),
    )


def _waits(lines: Iterable[Line]) -> Iterable[float]:
    """Seconds that training waited for a save: what is booked between two commits of an attempt."""
    first = True
    for line in lines:
        if line["event"] == "commit" and not first:
            yield line["seconds"].get("checkpoint", 0.0)
        first = line["event"] == "attempt" or (first and line["event"] != "commit")


def _behind(save: Line) -> float:
    seconds: float = save["upload_s"] + save["commit_s"]
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
