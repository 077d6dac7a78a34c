"""What fine-tuning minimises: one objective a file. Adding one is one file, one line in the union and one in build_objective."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Discriminator, Tag

from draf_dist.losses.gather import Gather
from draf_dist.objectives.aum import AumObjective, AumObjectiveConfig
from draf_dist.objectives.cox import CoxObjective, CoxObjectiveConfig
from draf_dist.objectives.drfuse import DrfuseObjective, DrfuseObjectiveConfig
from draf_dist.objectives.fusion import FusionObjective, FusionObjectiveConfig
from draf_dist.schema.modality import DataSchema


def _kind(value: object) -> str:
    """Most jobs don't say it: that of all models without losses of their own."""
    return str(value.get("kind", "fusion")) if isinstance(value, Mapping) else getattr(value, "kind", "")


FinetuneObjectiveConfig = Annotated[
    Annotated[FusionObjectiveConfig, Tag("fusion")]
    | Annotated[AumObjectiveConfig, Tag("aum")]
    | Annotated[DrfuseObjectiveConfig, Tag("drfuse")]
    | Annotated[CoxObjectiveConfig, Tag("cox")],
    Discriminator(_kind),
]
# Models whose own losses train parameters that no other objective reaches.
_OF_MODEL: dict[str, type[AumObjectiveConfig] | type[DrfuseObjectiveConfig]] = {
    "aum": AumObjectiveConfig,
    "drfuse": DrfuseObjectiveConfig,
}
FinetuneObjective = FusionObjective | AumObjective | DrfuseObjective | CoxObjective


def objective_of(model: str) -> FinetuneObjectiveConfig:
    """The objective of a model of this kind, with its default weights."""
    return _OF_MODEL.get(model, FusionObjectiveConfig)()


def objectives_of(model: str) -> tuple[str, ...]:
    """The kinds of objective that train all of a model of this kind, its own first."""
    own = objective_of(model).kind
    return (own, "cox") if own == "fusion" else (own,)


def build_objective(config: FinetuneObjectiveConfig, schema: DataSchema, gather: Gather) -> FinetuneObjective:
    """The objective of a job. gather: the rows of all ranks, for terms that look at the whole batch."""
    match config:
        case AumObjectiveConfig() | CoxObjectiveConfig():
            return config.build(schema, gather)
        case _:
            return config.build()
