"""The specs of training jobs: what all of them have, and fine-tuning."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from draf_dist.config.spec import Spec, fingerprint
from draf_dist.data.bad_data import BadData
from draf_dist.data.corruption import TrainingCorruption
from draf_dist.errors import SpecError, explain
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.kinds import ModelConfig
from draf_dist.objectives.bayesian import BayesianObjectiveConfig
from draf_dist.objectives.finetune import FinetuneObjectiveConfig, objective_of, objectives_of
from draf_dist.storage import has_credentials
from draf_dist.training.watch.bad_loss import BadLoss

VERSION = r"^[0-9a-f]{16}$"
PINNED = re.compile(r"@(?:[0-9a-f]{16}|[0-9a-f]{64})$")


class OptimizerConfig(Spec):
    """Adam (decoupled weight decay), linear warm-up, then cosine to 0. clip_norm None: gradients are not clipped."""

    learning_rate: float = Field(1e-3, gt=0)
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float | None = Field(None, gt=0)


class CheckpointConfig(Spec):
    """A checkpoint is written after every epoch, and within epochs every `every_steps`; the newest `keep` stay.

    keep_best: so many of the best by the score of validation stay besides.
    """

    every_steps: int = Field(200, ge=1)
    keep: int = Field(2, ge=1)
    # Left out of the stored form where it is not set: jobs from before there was such a thing keep their names.
    keep_best: int = Field(1, ge=1, exclude_if=lambda kept: kept == 1)


class Replay(Spec):
    """A mixture of what is new in a release and what is old, in the order of the samples (docs/order.md, 5).

    since: a version of the same data set: training shards that it lacks are new, those that it has are old. new, old: of
    new + old samples so many are of each. An epoch of the run is one pass over the new.
    """

    since: str = Field(pattern=VERSION)
    new: int = Field(1, ge=1)
    old: int = Field(1, ge=1)


class TrainJob(Spec):
    """What every training job has; where it runs and where it is written are no part of it.

    release: URL, or URL@version; a run pins the version. groups, open_samples: see docs/order.md. patience: epochs without a lower
    validation score after which training stops. bad_data: what happens to a member that can't be used, see docs/loader.md.
    on_bad_loss: what happens at a step whose loss or gradient is bad, see docs/troubleshooting.md.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    release: str
    seed: int = Field(0, ge=0)
    batch_size: int = Field(64, ge=1)
    groups: int = Field(64, ge=1)
    open_samples: int = Field(65_536, ge=1)
    epochs: int = Field(30, ge=1)
    patience: int = Field(10, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    # Left out of the stored form where it is not set: jobs from before there was such a thing keep their names.
    bad_data: BadData = Field(BadData(), exclude_if=lambda rule: rule == BadData())
    on_bad_loss: BadLoss = Field(BadLoss(), exclude_if=lambda rule: rule == BadLoss())

    @field_validator("release")
    @classmethod
    def _release_without_secret(cls, release: str) -> str:
        return without_secret("release", release)

    @property
    def reads(self) -> dict[str, str]:
        """Key -> URL of everything that it reads."""
        return {"release": self.release}

    @property
    def score(self) -> str:
        """The number of a validation that is to fall."""
        return "loss"

    @property
    def sha256(self) -> str:
        """What tells this job from every other one; 64 hex digits."""
        return fingerprint(self)

    @property
    def run_name(self) -> str:
        """The name of the run folder: <job>-<8 hex of the resolved job>."""
        return f"{self.name}-{self.sha256[:8]}"


class FinetuneJob(TrainJob):
    """A fusion model on labelled studies.

    pretrained: modality -> URL of a finished pre-training run, whose encoder it starts from; a run pins the encoder's sha256.
    warm_start: URL of a finished fine-tuning run, from whose weights and normalisation it goes on; pinned likewise.
    objective: by default that of the model; others leave a part of it untrained, but for `cox`, which is for times.
    label_fraction: share of the training studies whose label is used; a larger share holds all of a smaller one. label_fraction_of:
    `studies` by a coin each; `subjects` whole, of every site and label the same share. passes_train, passes_eval: Monte-Carlo
    passes per step and per validation.
    """

    kind: Literal["finetune"] = "finetune"
    model: ModelConfig = DrafConfig()
    objective: FinetuneObjectiveConfig = Field(default_factory=lambda job: objective_of(job["model"].kind))
    pretrained: dict[str, str] = {}
    # Left out of the stored form where they are not set: jobs from before there was such a thing keep their names.
    warm_start: str | None = Field(None, exclude_if=lambda url: url is None)
    replay: Replay | None = Field(None, exclude_if=lambda replay: replay is None)
    label_fraction: float = Field(1.0, gt=0, le=1)
    label_fraction_of: Literal["studies", "subjects"] = Field("studies", exclude_if=lambda chosen: chosen == "studies")
    corruption: TrainingCorruption = TrainingCorruption()
    passes_train: int = Field(4, ge=1)
    passes_eval: int = Field(30, ge=1)

    @field_validator("pretrained")
    @classmethod
    def _encoders_without_secret(cls, pretrained: dict[str, str]) -> dict[str, str]:
        return {modality: without_secret(f"pretrained.{modality}", url) for modality, url in pretrained.items()}

    @field_validator("warm_start")
    @classmethod
    def _start_without_secret(cls, warm_start: str | None) -> str | None:
        return None if warm_start is None else without_secret("warm_start", warm_start)

    @model_validator(mode="after")
    def _one_start(self) -> "FinetuneJob":
        if self.warm_start is not None and self.pretrained:
            raise ValueError("warm_start and pretrained exclude each other: a run that goes on from another has its encoders")
        return self

    @model_validator(mode="after")
    def _objective_of_the_model(self) -> "FinetuneJob":
        known = objectives_of(self.model.kind)
        if self.objective.kind not in known:
            found = f"model {self.model.kind} is trained by the objective {' or '.join(known)}, not {self.objective.kind}"
            raise ValueError(f"{found}: set objective.kind to {known[0]}, or choose another model.kind")
        return self

    @model_validator(mode="after")
    def _passes_of_the_objective(self) -> "FinetuneJob":
        if isinstance(self.objective, BayesianObjectiveConfig) and self.passes_train < self.objective.least_passes:
            found = f"passes_train is {self.passes_train}, and the objective looks at uncertainty, which one pass does not show"
            raise ValueError(f"{found}: set it to 2 or more, or lambda_att to 0 and leave `adversarial` out")
        return self

    @property
    def reads(self) -> dict[str, str]:
        """Key -> URL of everything that it reads."""
        start = {} if self.warm_start is None else {"warm_start": self.warm_start}
        return {**super().reads, **{f"pretrained.{modality}": url for modality, url in self.pretrained.items()}, **start}

    @property
    def score(self) -> str:
        """The NLL of validation, in nats."""
        return "nll"


def without_secret(key: str, url: str) -> str:
    """The URL, if it holds no credentials. What pins it (`@` and hex digits at its end) is none, also where it names a bucket.

    Raises:
        SpecError: it does. Not a ValueError: pydantic's own message would repeat the value.
    """
    if has_credentials(url):
        remedy = "Put them into the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY."
        raise SpecError(explain(key, expected="a URL without credentials", found="one with", remedy=remedy))
    return url
