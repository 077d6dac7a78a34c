"""trials.jsonl: one line for every trial that has ended, written before anything else learns of it."""

from typing import Literal

from draf_dist.schema.record import Record
from draf_dist.tuning.campaign_job import Value

State = Literal["finished", "stopped", "failed"]


class TrialRecord(Record):
    """How a trial ended. Numbers of validation are those of best_epoch, whose weights its run keeps; None where it failed.

    state: `stopped` before its end, because others were better by then. run, pretraining: names of run folders below trials/.
    training_s: that its runs booked, over all attempts, idle time left out; where an earlier trial had the same settings, only what
    this one added to their run. profile: where it trained, in words. wall_s: from being chosen to being recorded, as the
    driver saw it that recorded the trial; overhead_s: what of it no training accounts for.
    """

    trial: int
    parameters: dict[str, Value]
    state: State
    profile: str = ""
    reason: str = ""
    run: str | None = None
    pretraining: str | None = None
    epochs: int = 0
    best_epoch: int | None = None
    objective: float | None = None
    nll: float | None = None
    nll_scaled: float | None = None
    temperature: float | None = None
    auroc: float | None = None
    training_s: float = 0.0
    wall_s: float = 0.0
    overhead_s: float = 0.0
    time: float
