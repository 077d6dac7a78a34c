"""Asynchronous successive halving as a table: which trial reached which rung with what, and whether it was to go on.

The rule is that of ray.tune's AsyncHyperBandScheduler with one bracket (Li et al. 2020, arXiv 1810.05934). Ray's own table lives in
memory and is gone with the driver; this one is a list of entries, written down one by one.
"""

from collections.abc import Iterable

import numpy as np

from draf_dist.schema.record import Record
from draf_dist.tuning.campaign_job import CampaignJob, Stopping
from draf_dist.tuning.point import max_epochs as most_epochs


class RungEntry(Record):
    """A trial at a rung. rung: epochs; value: its objective then; cutoff: above it a trial stops, None for the first one there."""

    rung: int
    trial: int
    value: float
    cutoff: float | None
    stopped: bool


class Rungs:
    """The table. max_epochs: the most that a trial can take; there is no rung there."""

    def __init__(self, stopping: Stopping | None, max_epochs: int, entries: Iterable[RungEntry] = ()) -> None:
        self._keep = 1.0 if stopping is None else 1 / stopping.reduction_factor
        self.milestones = () if stopping is None else milestones(stopping, max_epochs)
        self._entries: dict[tuple[int, int], RungEntry] = {}
        for entry in entries:
            self.enter(entry)

    def enter(self, entry: RungEntry) -> None:
        """Adds an entry; a trial stands at a rung once.

        Raises:
            ValueError: it does already.
        """
        if (entry.rung, entry.trial) in self._entries:
            raise ValueError(f"trial {entry.trial} stands at rung {entry.rung} already")
        self._entries[entry.rung, entry.trial] = entry

    def decide(self, trial: int, epoch: int, value: float, last: int | None = None) -> RungEntry | None:
        """What is to be entered now that a trial has done `epoch` epochs; None between rungs, and where it stands already.

        The cut-off is the (1/reduction_factor)-quantile of those who came before, the trial itself not among them.
        last: epoch at which this trial ends by itself, if it is sooner than others: it stands at no rung from there on.
        """
        rung = max((m for m in self.milestones if m <= epoch and (last is None or m < last)), default=None)
        if rung is None or (rung, trial) in self._entries:
            return None
        others = [entry.value for (at, _), entry in self._entries.items() if at == rung]
        cutoff = float(np.percentile(others, 100 * self._keep)) if others else None
        return RungEntry(rung=rung, trial=trial, value=value, cutoff=cutoff, stopped=cutoff is not None and value > cutoff)

    def stopped(self, trial: int, epoch: int) -> bool:
        """Whether the trial was stopped at one of those that it has reached with so many epochs.

        A trial that is continued reports its epochs from the first one on: it stops where it did before, not sooner.
        """
        return any(e.stopped for (rung, number), e in self._entries.items() if number == trial and rung <= epoch)


def milestones(stopping: Stopping, max_epochs: int) -> tuple[int, ...]:
    """grace_epochs x reduction_factor^k, as long as it lies before the last epoch; empty where nothing is ever stopped."""
    found, rung = [], stopping.grace_epochs
    while rung < max_epochs:
        found.append(rung)
        rung *= stopping.reduction_factor
    return tuple(found)


def nothing_is_stopped(campaign: CampaignJob) -> str | None:
    """A warning where stopping is asked for and no trial is long enough for it."""
    most, stopping = most_epochs(campaign), campaign.stopping
    if stopping is None or milestones(stopping, most):
        return None
    return f"stopping.grace_epochs is {stopping.grace_epochs} and a trial takes at most {most} epochs: nothing is ever stopped."
