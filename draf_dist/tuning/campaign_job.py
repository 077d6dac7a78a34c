"""The spec of a campaign: which job, which of its settings are sought where, for how long."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from draf_dist.config.spec import Spec, apply_overrides, fingerprint, read_yaml, validate_spec
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import RESOLVED, AnyJob
from draf_dist.training.pretrain_job import PretrainJob

Value = bool | int | float | str
# What may differ when a campaign is continued: how long it goes on and where, not what it seeks.
MAY_CHANGE = ("budget", "concurrent", "max_failures")


class Range(Spec):
    """All numbers from low to high. log: even in the logarithm; integer: whole numbers only."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low: expected less than high, found {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low: expected more than 0 with log, found {self.low:g}")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError("low and high: expected whole numbers with integer")
        return self


class Choices(Spec):
    """One of these values."""

    choices: tuple[Value, ...] = Field(min_length=2)

    @field_validator("choices")
    @classmethod
    def _different(cls, choices: tuple[Value, ...]) -> tuple[Value, ...]:
        if len(set(choices)) != len(choices):
            raise ValueError("a choice is listed twice")
        return choices


def _form(value: Any) -> str:
    keys = value if isinstance(value, Mapping) else getattr(value, "model_fields_set", ())
    return "choices" if "choices" in keys else "range"


Parameter = Annotated[Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")], Discriminator(_form)]


def _or_path(schema: dict[str, Any]) -> None:
    """For editors: a file may name another file instead."""
    own = schema.pop("anyOf", None) or [{"$ref": schema.pop("$ref")}]
    schema["anyOf"] = [{"type": "string"}, *own]


class Base(Spec):
    """The jobs that a trial carries out, each as the path of its file or written out.

    pretrain: where there is one, every trial fine-tunes from its encoder; trials with the same pre-training share one run.
    """

    finetune: FinetuneJob = Field(json_schema_extra=_or_path)
    pretrain: PretrainJob | None = Field(None, json_schema_extra=_or_path)

    @model_validator(mode="after")
    def _one_encoder(self) -> "Base":
        if self.pretrain is not None and self.pretrain.objective.modality in self.finetune.pretrained:
            raise ValueError(f"finetune.pretrained.{self.pretrain.objective.modality}: expected none, since pretrain makes it")
        return self


class Stopping(Spec):
    """Asynchronous successive halving: of those that reach grace_epochs x reduction_factor^k the best 1/reduction_factor go on."""

    grace_epochs: int = Field(1, ge=1)
    reduction_factor: int = Field(3, ge=2)


class Budget(Spec):
    """trials: how many in all, failed ones included. worker_hours: of all workers together, after which no new trial begins."""

    trials: int = Field(ge=1)
    worker_hours: float | None = Field(None, gt=0)


class CampaignJob(Spec):
    """A search over settings of a fine-tuning job, or of a pre-training and the fine-tuning that follows.

    release: of all jobs, in place of their own. space: dotted path, such as finetune.model.reliability_alpha, to its values.
    objective: the number of validation that is to fall, at the epoch whose weights a run keeps; nll_scaled is the NLL after
    temperature scaling. stopping: None carries every trial to its end. concurrent: trials at a time, as far as there is room.
    max_failures: so many trials may fail; one more ends the campaign. seed: of the search, not of the jobs.
    """

    kind: Literal["campaign"] = "campaign"
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    base: Base
    release: str | None = None
    space: dict[str, Parameter] = Field(min_length=1)
    objective: Literal["nll_scaled", "nll"] = "nll_scaled"
    budget: Budget
    stopping: Stopping | None = Stopping()
    concurrent: int = Field(1, ge=1)
    max_failures: int = Field(3, ge=0)
    seed: int = Field(0, ge=0)

    @property
    def stages(self) -> dict[str, AnyJob]:
        """The jobs of a trial by the first word of their paths, in the order in which they run."""
        found: dict[str, AnyJob] = {"finetune": self.base.finetune}
        if self.base.pretrain is not None:
            found = {"pretrain": self.base.pretrain, **found}
        if self.release is None:
            return found
        # Validated again: a URL with credentials must not get past by this door.
        trees = {name: job.model_dump() | {"release": self.release} for name, job in found.items()}
        return {name: validate_spec(tree, type(found[name]), where=f"base.{name}") for name, tree in trees.items()}

    @property
    def fixed(self) -> dict[str, Any]:
        """What must be the same for a campaign to be continued."""
        return self.model_dump(mode="json", exclude=set(MAY_CHANGE))

    @property
    def folder_name(self) -> str:
        """<name>-<8 hex of what must stay the same>."""
        return f"{self.name}-{fingerprint(self.fixed)[:8]}"


def load_campaign(path: Path | str, overrides: Sequence[str] = ()) -> CampaignJob:
    """The campaign in a YAML file, its jobs read from the files that it names (relative to the working folder).

    An override may go into a job: base.finetune.epochs=5.

    Raises:
        SpecError: one line for every problem.
    """
    tree = read_yaml(path)
    _read_jobs(tree)
    apply_overrides(tree, overrides)
    _read_jobs(tree)
    return validate_spec(tree, CampaignJob, where=str(path))


def _read_jobs(tree: dict[str, Any]) -> None:
    base = tree.get("base")
    if isinstance(base, dict):
        for stage, job in base.items():
            if isinstance(job, str):
                found = read_yaml(job)
                base[stage] = {key: value for key, value in found.items() if key != RESOLVED}
