"""A point of the search space, and the jobs there."""

from collections.abc import Mapping
from typing import Any

from draf_dist.config.spec import validate_spec
from draf_dist.training.jobs import AnyJob
from draf_dist.tuning.campaign_job import CampaignJob, Range, Value

# Dotted path -> value.
Point = dict[str, Value]
EPOCHS_PATH = "finetune.epochs"


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


def epochs_at(campaign: CampaignJob, point: Mapping[str, Value]) -> int:
    """After how many epochs of fine-tuning a trial ends at the latest."""
    return int(point.get(EPOCHS_PATH, campaign.base.finetune.epochs))


def max_epochs(campaign: CampaignJob) -> int:
    """The most epochs that a trial can take."""
    sought = campaign.space.get(EPOCHS_PATH)
    if sought is None:
        return campaign.base.finetune.epochs
    return int(sought.high) if isinstance(sought, Range) else max(int(choice) for choice in sought.choices)


def _inside(tree: dict[str, Any], parents: list[str]) -> dict[str, Any]:
    for parent in parents:
        tree = tree[parent]
    return tree
