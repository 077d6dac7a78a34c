"""The types of bench.json: every number of the table. No NaN, no subject."""

from typing import Literal

from draf_dist.evaluation.bench_folds import Fold
from draf_dist.evaluation.results import Floor, Metrics
from draf_dist.schema.record import Record


class Row(Record):
    """One system, or one baseline (`seeds` is (0,) there).

    metrics: of the pooled out-of-fold predictions, temperature-scaled, each the mean over seeds of the number of that seed.
    differences: this row - reference, with the same resamples; empty for the reference itself. auroc_by_seed, auroc_by_fold
    (mean over seeds): without intervals. temperatures: of every cell, folds of the first seed first. wall_s: mean of a cell.
    """

    system: str
    is_baseline: bool
    seeds: tuple[int, ...]
    metrics: Metrics
    differences: Metrics
    ece_floor: Floor
    auroc_by_seed: tuple[float | None, ...]
    auroc_by_fold: tuple[float | None, ...]
    auroc_median_fold: float | None
    temperatures: tuple[float, ...]
    wall_s: float


class BenchAbout(Record):
    """What was compared. settings: the resolved job. releases: versions of the folds. uid_sum: of the receipt of all studies."""

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


class Bench(Record):
    """bench.json."""

    format: Literal[1] = 1
    about: BenchAbout
    rows: tuple[Row, ...]
