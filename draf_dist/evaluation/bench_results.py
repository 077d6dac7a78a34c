"""The types of bench.json: every number of the table. No NaN, no subject."""

from typing import Literal

from pydantic import Field

from draf_dist.evaluation.bench_folds import Fold
from draf_dist.evaluation.bench_missing import MissingFromStart
from draf_dist.evaluation.results import Floor, Metrics
from draf_dist.evaluation.task_scores import TaskName
from draf_dist.schema.record import Record


class SeedTest(Record):
    """Student's paired t-test over training seeds of row - reference: 95 % interval and p, which speak of other seeds alone."""

    mean: float
    low: float
    high: float
    p: float | None


class Row(Record):
    """One system, or one baseline (`seeds` is (0,) there).

    metrics: of the pooled out-of-fold predictions, temperature-scaled, each the mean over seeds of the number of that seed.
    differences: this row - reference, with the same resamples; empty for the reference itself. auroc_by_seed, auroc_by_fold
    (mean over seeds): without intervals; of times c_index_by_seed and so on in their place. temperatures: of every cell, folds of
    the first seed first. wall_s: mean of a cell. holm: p of every difference, corrected for the number of rows that are compared.
    over_seeds: of AUROC or C-index, where reference and row have the same two or more seeds.
    """

    system: str
    is_baseline: bool
    seeds: tuple[int, ...]
    metrics: Metrics
    differences: Metrics
    ece_floor: Floor
    auroc_by_seed: tuple[float | None, ...] = ()
    auroc_by_fold: tuple[float | None, ...] = ()
    auroc_median_fold: float | None = None
    temperatures: tuple[float, ...]
    wall_s: float
    c_index_by_seed: tuple[float | None, ...] = Field((), exclude_if=lambda values: not values)
    c_index_by_fold: tuple[float | None, ...] = Field((), exclude_if=lambda values: not values)
    c_index_median_fold: float | None = Field(None, exclude_if=lambda value: value is None)
    c_index_mean_fold: float | None = Field(None, exclude_if=lambda value: value is None)
    holm: dict[str, float] = Field({}, exclude_if=lambda found: not found)
    over_seeds: SeedTest | None = Field(None, exclude_if=lambda found: found is None)

    @property
    def primary_median_fold(self) -> float | None:
        """The median over folds of AUROC, or of the C-index."""
        return self.c_index_median_fold if self.c_index_by_fold else self.auroc_median_fold


class UnderCondition(Record):
    """One system under one condition, temperature-scaled as on clean studies; every number is the mean over seeds and cases.

    metrics: auroc (of times c_index), nll, and regret (nats, mean KL(posterior || model)) where the exact posterior is known.
    differences: to the reference, with the same resamples. holm: p of each difference, corrected for the number of systems. Both
    are empty for the reference. by_case: the first of metrics by ConditionResult.cases, without intervals.
    """

    system: str
    metrics: Metrics
    differences: Metrics
    holm: dict[str, float]
    by_case: tuple[float | None, ...]


class ConditionResult(Record):
    """All systems under one condition; cases: the modalities that were hit one after another, else what `hits` says."""

    name: str
    cases: tuple[str, ...]
    rows: tuple[UnderCondition, ...]


class BenchAbout(Record):
    """What was compared. settings: the resolved job. releases: versions of the folds. uid_sum: of the receipt of all studies.

    classes: what class_counts counts: classes; of several labels each, of times censored and event. auroc_of_absence: of the
    number of missing modalities as a score of the second of two classes, where these were taken from the start.
    """

    name: str
    job_sha256: str
    data: str
    card_sha256: str
    label: str
    classes: tuple[str, ...]
    num_studies: int
    num_subjects: int
    num_sites: int
    class_counts: tuple[int, ...]
    uid_sum: str
    folds: tuple[Fold, ...]
    releases: tuple[str, ...]
    reference: str
    bootstrap: int
    git_commit: str | None
    task: TaskName = Field("class", exclude_if=lambda task: task == "class")
    missing_from_start: MissingFromStart | None = Field(None, exclude_if=lambda missing: missing is None)
    auroc_of_absence: float | None = Field(None, exclude_if=lambda value: value is None)


class Bench(Record):
    """bench.json."""

    format: Literal[1] = 1
    about: BenchAbout
    rows: tuple[Row, ...]
    # `clean` among them; none, and left out, where the benchmark has no other condition and no truth is known.
    conditions: tuple[ConditionResult, ...] = Field((), exclude_if=lambda conditions: not conditions)
