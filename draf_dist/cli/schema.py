"""`draf schema`: the JSON schema of a spec, for editors."""

import json as json_module
from enum import StrEnum
from typing import Annotated

import typer
from pydantic import BaseModel


class SpecKind(StrEnum):
    """Specs that a user writes."""

    card = "card"
    finetune = "finetune"
    evaluate = "evaluate"


def schema(kind: Annotated[SpecKind, typer.Argument(help="Which spec.")]) -> None:
    """Print the JSON schema of a spec, so that an editor completes and checks it.

    Example: draf schema card > card.schema.json
    """
    typer.echo(json_module.dumps(_model(kind).model_json_schema(), indent=2))


def _model(kind: SpecKind) -> type[BaseModel]:
    from draf_dist.evaluation.job import EvaluateJob
    from draf_dist.sources.card import Card
    from draf_dist.training.job import FinetuneJob

    models: dict[SpecKind, type[BaseModel]] = {
        SpecKind.card: Card,
        SpecKind.finetune: FinetuneJob,
        SpecKind.evaluate: EvaluateJob,
    }
    return models[kind]
