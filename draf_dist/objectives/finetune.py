"""What fine-tuning minimises: one objective a file. Adding one is one file, one line in the union and one in build_objective."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Discriminator, Tag

from draf_dist.config.spec import kind_or
from draf_dist.losses.gather import Gather
from draf_dist.models.kinds import ModelConfig
from draf_dist.models.segmentation import BayesianUnetConfig
from draf_dist.objectives.adversarial import Reduce
from draf_dist.objectives.aum import AumObjective, AumObjectiveConfig
from draf_dist.objectives.bayesian import BayesianObjective, BayesianObjectiveConfig
from draf_dist.objectives.cox import CoxObjective, CoxObjectiveConfig
from draf_dist.objectives.drfuse import DrfuseObjective, DrfuseObjectiveConfig
from draf_dist.objectives.fusion import FusionObjective, FusionObjectiveConfig
from draf_dist.objectives.head_targets import head_targets
from draf_dist.schema.modality import DataSchema

# Most jobs don't say a kind: theirs is that of all models without losses of their own.
FinetuneObjectiveConfig = Annotated[
    Annotated[FusionObjectiveConfig, Tag("fusion")]
    | Annotated[AumObjectiveConfig, Tag("aum")]
    | Annotated[DrfuseObjectiveConfig, Tag("drfuse")]
    | Annotated[CoxObjectiveConfig, Tag("cox")]
    | Annotated[BayesianObjectiveConfig, Tag("bayesian")],
    Discriminator(kind_or("fusion")),
]
# Models whose own losses train parameters that no other objective reaches.
_OF_MODEL: dict[str, type[AumObjectiveConfig | DrfuseObjectiveConfig | BayesianObjectiveConfig]] = {
    "aum": AumObjectiveConfig,
    "drfuse": DrfuseObjectiveConfig,
    "bayesian_unet": BayesianObjectiveConfig,
}
FinetuneObjective = FusionObjective | AumObjective | DrfuseObjective | CoxObjective | BayesianObjective


@dataclass(frozen=True)
class Course:
    """What an objective may have to know of its run.

    num_train: N, studies whose target training may use. num_steps: of the whole run. seed: the job's. gather: the rows of all
    ranks, for terms that look at the whole batch. reduce: the sum over ranks.
    """

    num_train: int
    num_steps: int
    seed: int
    gather: Gather
    reduce: Reduce


def objective_of(model: str) -> FinetuneObjectiveConfig:
    """The objective of a model of this kind, with its default weights."""
    return _OF_MODEL.get(model, FusionObjectiveConfig)()


def objectives_of(model: str) -> tuple[str, ...]:
    """The kinds of objective that train all of a model of this kind, its own first."""
    own = objective_of(model).kind
    return (own, "cox") if own == "fusion" else (own,)


def build_objective(config: FinetuneObjectiveConfig, model: ModelConfig, schema: DataSchema, course: Course) -> FinetuneObjective:
    """The objective of a job, of a model that it trains.

    Raises:
        SpecError: the release has nothing that a head of the model could learn, or lacks an annotation.
    """
    match config:
        case AumObjectiveConfig() | CoxObjectiveConfig():
            return config.build(schema, course.gather)
        case BayesianObjectiveConfig():
            assert isinstance(model, BayesianUnetConfig)  # the job refuses every other one
            image = model.image_of(schema).name
            config.check(image, schema)
            return config.build(
                modality=image,
                num_train=course.num_train,
                num_steps=course.num_steps,
                seed=course.seed,
                reduce=course.reduce,
                heads=head_targets(model.heads, schema, config.head_masks),
            )
        case _:
            return config.build()
