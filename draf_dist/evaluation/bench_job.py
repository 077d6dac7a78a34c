"""The spec of a benchmark: systems x folds x seeds, and baselines on the same folds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from draf_dist.config.spec import Spec, apply_overrides, read_yaml, validate_spec
from draf_dist.errors import SpecError, explain, together
from draf_dist.evaluation.baselines import BaselineConfig
from draf_dist.evaluation.bench_conditions import BenchCondition
from draf_dist.evaluation.bench_missing import MissingFromStart
from draf_dist.training.job import FinetuneJob

Tree = dict[str, Any]
# What the benchmark itself gives to every job.
GIVEN = ("kind", "name", "release", "seed")
# Studies as they are; the other conditions have other names.
UNCHANGED = "clean"


class BenchJob(Spec):
    """What is compared, on what, and how.

    card: path of the dataset card. folds: parts into which its sites are divided; each is held out once. fold_seed: another one
    gives another partition. seeds: of training; every system is trained once per fold and seed. finetune: the parts of a
    fine-tuning job that all systems share. systems: name -> the parts in which it differs. baselines: trained without seeds.
    conditions: name -> what is done to the fold before it is predicted once more; `clean` is always there. missing_from_start: what
    the studies lose before anything else, in training too.
    reference: the system (or baseline) that differences are taken to. passes, batch_size: of prediction. bootstrap: resamples of
    subjects; bootstrap_seed: of their draws.
    """

    kind: Literal["bench"] = "bench"
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    card: Path
    folds: int = Field(5, ge=2)
    fold_seed: int = Field(0, ge=0)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    finetune: Tree = {}
    systems: dict[str, Tree]
    baselines: tuple[BaselineConfig, ...] = ()
    # Left out of the stored form where there are none: benchmarks from before there was such a thing keep their sha256.
    conditions: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")], BenchCondition] = Field(
        {}, exclude_if=lambda conditions: not conditions
    )
    missing_from_start: MissingFromStart | None = Field(None, exclude_if=lambda missing: missing is None)
    reference: str
    passes: int = Field(30, ge=2)
    batch_size: int = Field(64, ge=1)
    bootstrap: int = Field(1000, ge=0)
    bootstrap_seed: int = Field(0, ge=0)

    @field_validator("systems", mode="before")
    @classmethod
    def _empty_system_is_the_common_one(cls, systems: Any) -> Any:
        return {name: {} if tree is None else tree for name, tree in systems.items()} if isinstance(systems, dict) else systems

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError("a baseline is listed twice, or a system has the name of one")
        if self.reference not in names:
            raise ValueError(f"reference {self.reference!r} is none of {', '.join(names)}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("a seed is listed twice")
        if UNCHANGED in self.conditions:
            raise ValueError(f"the condition {UNCHANGED} is always there; give another name")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The rows of the table: systems in the order of the file, then baselines."""
        return (*self.systems, *(baseline.name for baseline in self.baselines))

    def jobs(self, where: str) -> dict[str, FinetuneJob]:
        """System -> its fine-tuning job, every default filled in; `release` and `seed` are yet to be given.

        Raises:
            SpecError: the problems of all systems together.
        """
        found, problems = {}, []
        for name, own in self.systems.items():
            tree, place = _merged(self.finetune, own), f"{where}: systems.{name}"
            problems += [_given(f"{place}.{key}") for key in GIVEN if key in tree]
            tree = {key: value for key, value in tree.items() if key not in GIVEN}
            try:
                found[name] = validate_spec({**tree, "name": name, "release": "fold"}, FinetuneJob, where=place)
            except SpecError as error:
                problems.append(str(error))
            else:
                problems += [_seen_before(place)] if found[name].pretrained else []
                problems += [_left_out(place)] if found[name].bad_data.policy != "fail" else []
                problems += [_fewer_labels(place)] if self.baselines and found[name].label_fraction < 1 else []
        if problems:
            raise SpecError(together(dict.fromkeys(problems)))
        return found


def load_bench_job(path: Path | str, overrides: Sequence[str] = ()) -> BenchJob:
    """The benchmark in a YAML file.

    Raises:
        SpecError: all problems of the file, or of all its systems, together.
    """
    tree = read_yaml(path)
    apply_overrides(tree, overrides)
    job = validate_spec(tree, BenchJob, where=str(path))
    job.jobs(str(path))
    return job


def _merged(common: Tree, own: Tree) -> Tree:
    """Own values win; mappings are merged key by key."""
    shared = [key for key in common if isinstance(common[key], dict) and isinstance(own.get(key), dict)]
    return {**common, **own, **{key: _merged(common[key], own[key]) for key in shared}}


def _given(place: str) -> str:
    return explain(place, expected="no such key", found="one", remedy="The benchmark gives it to every system.")


def _fewer_labels(place: str) -> str:
    remedy = "Baselines are trained on all labels of the same table: leave `baselines` empty, or the fraction out."
    return explain(f"{place}.label_fraction", expected="1", found="less", remedy=remedy)


def _left_out(place: str) -> str:
    remedy = "The table counts every study once: restore what is damaged; draf release verify names it."
    return explain(f"{place}.bad_data.policy", expected="fail", found="quarantine", remedy=remedy)


def _seen_before(place: str) -> str:
    remedy = "An encoder that was trained before may have seen the subjects of the fold that is held out."
    return explain(f"{place}.pretrained", expected="none", found="one", remedy=remedy)
