"""When a study was used, computed from the order alone: no log of samples is ever written."""

from dataclasses import dataclass

import numpy as np

from draf_dist.data.order import rank_entries
from draf_dist.data.release import open_release
from draf_dist.errors import SpecError, explain
from draf_dist.schema.identity import uid_name
from draf_dist.training.ledger import effective_commits
from draf_dist.training.plan import TrainingPlan, build_plan
from draf_dist.training.run_folder import open_run


@dataclass(frozen=True)
class Use:
    """One draw of a study: in optimizer step `step` (from 0), as entry `entry` of the global batch, on rank `rank` of `world`.

    source: new or old in a run with replay, empty in one without; epoch: of the source.
    """

    source: str
    epoch: int
    step: int
    entry: int
    rank: int
    world: int


def trace(run_url: str, uid: int) -> list[Use]:
    """Every use of a study in training so far, in the order of steps; empty for a study of another split.

    Raises:
        SpecError: no such run, or the release does not hold the study.
    """
    folder = open_run(run_url)
    release = open_release(folder.job.release)
    plan = build_plan(folder.job, release)
    found = _training_sample(plan, uid)
    if found is None and uid not in release.subjects()["uid"].to_pylist():
        where, remedy = f"uid {uid_name(uid)}", "Take a uid from subjects.parquet or from a file of predictions."
        raise SpecError(explain(where, expected=f"a study of {release.pinned_url}", found="none", remedy=remedy))
    commits = effective_commits(folder.ledger())
    if found is None or not commits:
        return []
    source, sample = found
    num_steps = commits[-1]["stop"]
    num_begun = -(-plan.order.num_drawn(num_steps)[source] // plan.sources[source].num_samples)
    uses: list[Use] = []
    for epoch in range(num_begun):
        step, entry = plan.order.locate(source, epoch, sample)
        if step < num_steps:
            world = next(commit["world"] for commit in commits if commit["start"] <= step < commit["stop"])
            rank = _rank_of(entry, plan.num_entries(step), plan.order.batch_size, world)
            uses.append(Use(plan.sources[source].name, epoch, step, entry, rank, world))
    return uses


def _rank_of(entry: int, num_entries: int, batch_size: int, world: int) -> int:
    cuts = (rank_entries(num_entries, batch_size, rank, world) for rank in range(world))
    return next(rank for rank, cut in enumerate(cuts) if cut.start <= entry < cut.stop)


def _training_sample(plan: TrainingPlan, uid: int) -> tuple[int, int] | None:
    """The (source, number in it) of a study in the training split, shards laid end to end; None if it is in another split."""
    for number, source in enumerate(plan.sources):
        first = 0
        for shard in source.release.shards("train"):
            found = np.flatnonzero(source.release.index(shard).uids == uid)
            if len(found):
                return number, first + int(found[0])
            first += shard.num_samples
    return None
