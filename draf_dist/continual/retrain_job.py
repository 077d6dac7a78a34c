"""The spec of a retraining: which model, on which data set, how much of the old is replayed, and who judges the result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from draf_dist.config.spec import Spec, apply_overrides, read_yaml, validate_spec
from draf_dist.continual.policy import GatePolicy, load_policy
from draf_dist.training.job import OptimizerConfig, without_secret

POLICY = "policy"


class ReplayWeights(Spec):
    """Of new + old training samples so many are of studies that came since the champion's release, and so many are older."""

    new: int = Field(1, ge=1)
    old: int = Field(1, ge=1)


def _or_path(schema: dict[str, Any]) -> None:
    """A file may name another file instead: editors are to accept both."""
    policy = schema.pop("$ref", None)
    schema["anyOf"] = [{"$ref": policy}, {"type": "string"}]


class RetrainJob(Spec):
    """One model, trained further on what has come since. What is not here is as in the champion's own job.

    registry: sqlite:///PATH; null as everywhere: DRAF_REGISTRY, else registry.db here. model: its registered name. release: URL of
    the data set, or URL@version; without a version the newest one. epochs: passes over what is new. patience: epochs without a
    lower validation NLL after which training stops. passes_eval: Monte-Carlo passes of a validation. policy: of the gate; in a file
    also the path of another file, relative to it.
    """

    kind: Literal["retrain"] = "retrain"
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    registry: str | None = None
    model: str
    release: str
    replay: ReplayWeights = ReplayWeights()
    seed: int = Field(0, ge=0)
    epochs: int = Field(10, ge=1)
    patience: int = Field(5, ge=1)
    batch_size: int = Field(64, ge=1)
    # Lower than for a new model: it is to learn what is new and keep the rest.
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4)
    passes_eval: int = Field(30, ge=1)
    policy: GatePolicy = Field(GatePolicy(), json_schema_extra=_or_path)

    @field_validator("release")
    @classmethod
    def _release_without_secret(cls, release: str) -> str:
        return without_secret("release", release)


def load_retrain(path: Path | str, overrides: Sequence[str] = ()) -> RetrainJob:
    """The retraining in a YAML file; a policy that stands in a file of its own is read from there.

    Raises:
        SpecError: one line for every problem.
    """
    tree, folder = read_yaml(path), Path(path).parent
    # Before and after: an override may name another file, or change one value of the file that is named.
    _read_policy(tree, folder)
    apply_overrides(tree, overrides)
    _read_policy(tree, folder)
    return validate_spec(tree, RetrainJob, where=str(path))


def _read_policy(tree: dict[str, Any], folder: Path) -> None:
    if isinstance(policy := tree.get(POLICY), str):
        tree[POLICY] = load_policy(folder / policy).model_dump(mode="json")
