"""The order of a campaign's trials, and what to know before the winner is believed."""

from statistics import median

from draf_dist.errors import DrafError, explain
from draf_dist.schema.record import Record
from draf_dist.tuning.campaign_job import CampaignJob
from draf_dist.tuning.point import epochs_at
from draf_dist.tuning.records import TrialRecord
from draf_dist.tuning.rungs import nothing_is_stopped
from draf_dist.tuning.space import at_edge

# Optuna's sampler draws the first trials blindly.
BLIND_TRIALS = 10


class Row(TrialRecord):
    """A trial in the order of the objective; rank None where it failed."""

    rank: int | None


class Leaderboard(Record):
    """All trials of a campaign, the best first, failed ones last. best: the first that was carried to its end.

    overhead_s: median over trials of what their wall time holds beyond training.
    """

    name: str
    objective: str
    parameters: tuple[str, ...]
    rows: tuple[Row, ...]
    best: TrialRecord
    finished: int
    stopped: int
    failed: int
    overhead_s: float
    warnings: tuple[str, ...]


def rank_trials(campaign: CampaignJob, records: list[TrialRecord]) -> Leaderboard:
    """The leaderboard; ties go to the trial that was begun first.

    Raises:
        DrafError: no trial has a result.
    """
    scored = sorted((record for record in records if record.objective is not None), key=_order)
    if not scored:
        remedy = "See trials.jsonl for the reasons."
        raise DrafError(explain("campaign", expected="a trial with a result", found="none", remedy=remedy))
    failed = sorted((record for record in records if record.objective is None), key=lambda record: record.trial)
    # One that was stopped has no finished run to take over.
    best = next((record for record in scored if record.state == "finished"), scored[0])
    ranked = [Row(**vars(record), rank=place) for place, record in enumerate(scored, start=1)]
    return Leaderboard(
        name=campaign.name,
        objective=campaign.objective,
        parameters=tuple(campaign.space),
        rows=(*ranked, *(Row(**vars(record), rank=None) for record in failed)),
        best=best,
        finished=sum(record.state == "finished" for record in records),
        stopped=sum(record.state == "stopped" for record in records),
        failed=len(failed),
        overhead_s=round(median(record.overhead_s for record in scored), 3),
        warnings=tuple(_warnings(campaign, records, best)),
    )


def _order(record: TrialRecord) -> tuple[float, int]:
    assert record.objective is not None
    return record.objective, record.trial


def _warnings(campaign: CampaignJob, records: list[TrialRecord], best: TrialRecord) -> list[str]:
    edges = [path for path, parameter in campaign.space.items() if at_edge(parameter, best.parameters[path])]
    found = [f"{path}: the best value, {best.parameters[path]}, lies at the edge of what was searched. Widen it." for path in edges]
    if len(records) <= BLIND_TRIALS:
        found.append(f"{len(records)} trials: the first {BLIND_TRIALS} are drawn blindly, so nothing was learned from them yet.")
    if best.epochs == best.best_epoch == epochs_at(campaign, best.parameters):
        found.append("The best trial was still getting better at its last epoch. Allow more epochs.")
    if failed := sum(record.state == "failed" for record in records):
        found.append(f"{failed} trials failed; their part of the space is unknown.")
    if repeated := len(records) - len({tuple(sorted(record.parameters.items())) for record in records}):
        found.append(f"{repeated} trials repeated the settings of others: they trained nothing anew.")
    if len(profiles := sorted({record.profile for record in records if record.profile})) > 1:
        found.append(f"Trials ran under different profiles ({'; '.join(profiles)}), so their numbers compare less well.")
    if (never := nothing_is_stopped(campaign)) is not None:
        found.append(never)
    return found
