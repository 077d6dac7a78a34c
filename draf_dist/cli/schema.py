"""`draf schema`: the JSON schema of a spec, for editors."""

import json as json_module
from enum import StrEnum
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter


class SpecKind(StrEnum):
    """Specs that a user writes."""

    card = "card"
    finetune = "finetune"
    pretrain = "pretrain"
    evaluate = "evaluate"
    bench = "bench"
    profile = "profile"


def schema(kind: Annotated[SpecKind, typer.Argument(help="Which spec.")]) -> None:
    """Print the JSON schema of a spec, so that an editor completes and checks it.

    Example: draf schema card > card.schema.json
    """
    # A union states its type in its members only.
    typer.echo(json_module.dumps({"type": "object", **_spec(kind).json_schema()}, indent=2))


def _spec(kind: SpecKind) -> TypeAdapter[Any]:
    from draf_dist.evaluation.bench_job import BenchJob
    from draf_dist.evaluation.job import EvaluateJob
    from draf_dist.launch.profile import AnyProfile
    from draf_dist.sources.card import SourceCard
    from draf_dist.training.job import FinetuneJob
    from draf_dist.training.pretrain_job import PretrainJob

    specs: dict[SpecKind, TypeAdapter[Any]] = {
        SpecKind.card: TypeAdapter(SourceCard),
        SpecKind.finetune: TypeAdapter(FinetuneJob),
        SpecKind.pretrain: TypeAdapter(PretrainJob),
        SpecKind.evaluate: TypeAdapter(EvaluateJob),
        SpecKind.bench: TypeAdapter(BenchJob),
        SpecKind.profile: TypeAdapter(AnyProfile),
    }
    return specs[kind]
