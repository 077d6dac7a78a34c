"""`draf schema`: the JSON schema of a spec, for editors."""

import json as json_module
from enum import StrEnum
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter


class SpecKind(StrEnum):
    """Specs that a user writes."""

    card = "card"
    delivery = "delivery"
    finetune = "finetune"
    pretrain = "pretrain"
    evaluate = "evaluate"
    bench = "bench"
    campaign = "campaign"
    gate = "gate"
    retrain = "retrain"
    profile = "profile"
    cluster = "cluster"


def schema(kind: Annotated[SpecKind, typer.Argument(help="Which spec.")]) -> None:
    """Print the JSON schema of a spec, so that an editor completes and checks it.

    Example: draf schema card > card.schema.json
    """
    # A union states its type in its members only.
    typer.echo(json_module.dumps({"type": "object", **_spec(kind).json_schema()}, indent=2))


def _spec(kind: SpecKind) -> TypeAdapter[Any]:
    from draf_dist.continual.policy import GatePolicy
    from draf_dist.continual.retrain_job import RetrainJob
    from draf_dist.evaluation.bench_job import BenchJob
    from draf_dist.evaluation.job import EvaluateJob
    from draf_dist.launch.cluster_profile import ClusterProfile
    from draf_dist.launch.profile import AnyProfile
    from draf_dist.schema.delivery import Delivery
    from draf_dist.sources.card import SourceCard
    from draf_dist.training.job import FinetuneJob
    from draf_dist.training.pretrain_job import PretrainJob
    from draf_dist.tuning.campaign_job import CampaignJob

    specs: dict[SpecKind, TypeAdapter[Any]] = {
        SpecKind.card: TypeAdapter(SourceCard),
        SpecKind.delivery: TypeAdapter(Delivery),
        SpecKind.finetune: TypeAdapter(FinetuneJob),
        SpecKind.pretrain: TypeAdapter(PretrainJob),
        SpecKind.evaluate: TypeAdapter(EvaluateJob),
        SpecKind.bench: TypeAdapter(BenchJob),
        SpecKind.campaign: TypeAdapter(CampaignJob),
        SpecKind.gate: TypeAdapter(GatePolicy),
        SpecKind.retrain: TypeAdapter(RetrainJob),
        SpecKind.profile: TypeAdapter(AnyProfile),
        SpecKind.cluster: TypeAdapter(ClusterProfile),
    }
    return specs[kind]
