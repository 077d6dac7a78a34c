"""A point of the search space, and the jobs there."""

from collections.abc import Mapping
from typing import Any

from draf_dist.config.spec import validate_spec
from draf_dist.training.jobs import AnyJob
from draf_dist.tuning.campaign_job import CampaignJob, Value

# Dotted path -> value.
Point = dict[str, Value]


def jobs_at(campaign: CampaignJob, point: Mapping[str, Value]) -> dict[str, AnyJob]:
    """The jobs of a trial.

    Raises:
        SpecError: values that each job accepts alone but not together.
    """
    stages = campaign.stages
    trees = {name: job.model_dump(mode="json") for name, job in stages.items()}
    for path, value in point.items():
        *parents, last = path.split(".")
        _inside(trees, parents)[last] = value
    return {name: validate_spec(tree, type(stages[name]), where=name) for name, tree in trees.items()}


def base_value(campaign: CampaignJob, path: str) -> Value | None:
    """What the base jobs say at a path."""
    *parents, last = path.split(".")
    found: Value | None = _inside({name: job.model_dump(mode="json") for name, job in campaign.stages.items()}, parents)[last]
    return found


def _inside(tree: dict[str, Any], parents: list[str]) -> dict[str, Any]:
    for parent in parents:
        tree = tree[parent]
    return tree
