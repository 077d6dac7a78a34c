"""`draf bench`: systems x folds x seeds through an executor, then one table."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from draf_dist.config.spec import fingerprint
from draf_dist.data.receipts import receipt
from draf_dist.data.release import Release
from draf_dist.errors import DrafError, SpecError, explain, together
from draf_dist.evaluation import bench_folds as folds
from draf_dist.evaluation.baselines import BaselineConfig
from draf_dist.evaluation.bench_cell import (
    Cell,
    CellResult,
    condition_predictions,
    fold_predictions,
    is_finished,
    read_result,
    run_cell,
)
from draf_dist.evaluation.bench_disturbed import Comparison
from draf_dist.evaluation.bench_folds import FoldPlan
from draf_dist.evaluation.bench_job import UNCHANGED, BenchJob
from draf_dist.evaluation.bench_report import markdown
from draf_dist.evaluation.bench_results import Bench, BenchAbout, ConditionResult, Row
from draf_dist.evaluation.bench_scores import (
    Pooled,
    differences_of,
    floor_of,
    holm_of,
    metrics_of,
    pool,
    primary_by_fold,
    primary_by_seed,
    replicate,
    seed_test,
)
from draf_dist.evaluation.cox_baseline import check_cox
from draf_dist.evaluation.cox_regression import CoxRegressionConfig
from draf_dist.evaluation.describe import CENSORED, EVENT
from draf_dist.evaluation.follow_up import FollowUp, follow_ups_of
from draf_dist.evaluation.predictions import ALL, Predictions, concatenate
from draf_dist.evaluation.regret import PlantedTruth, posterior
from draf_dist.evaluation.scoring import TASKS, task_asked
from draf_dist.evaluation.statistics import Floats, Resamples, Rows
from draf_dist.executor import Done, Executor, Failed
from draf_dist.metrics.classification import auroc
from draf_dist.schema.modality import ImageSpec
from draf_dist.sources.card import AnyCard, load_card
from draf_dist.storage import Store, open_store
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import git_commit
from draf_dist.training.run import RUNS

RESULT, REPORT, CELLS = "bench.json", "results.md", "cells"
Finished = tuple[Cell, CellResult]
Truth = Mapping[int, PlantedTruth]
# What a cell predicted, by case.
PartsOf = Callable[[Cell], list[Predictions]]


class Progress(Protocol):
    """Who is told how it goes."""

    def fold(self, number: int, num_folds: int) -> None:
        """A fold's release is there."""
        ...

    def cell(self, cell: Cell, result: CellResult, finished: int, total: int) -> None:
        """A cell is finished; `finished` counts those of earlier calls too."""
        ...

    def failed(self, cell: Cell, message: str) -> None:
        """A cell failed; the others go on."""
        ...

    def scoring(self) -> None:
        """All cells are there; intervals are being computed."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A benchmark whose folds are there. uids: of the studies that each fold counts."""

    job: BenchJob
    card: AnyCard
    store: Store
    plan: FoldPlan
    releases: tuple[Release, ...]
    cells: tuple[Cell, ...]


def default_folder(job: BenchJob, subject_key: bytes) -> str:
    """runs/<name>-<8 hex of what decides the folds>: a changed system stays in the folder, and only its cells are repeated."""
    return f"{RUNS}/{job.name}-{_identity(job, load_card(job.card), subject_key)[:8]}"


def prepare_bench(job: BenchJob, raw: Path, out: str, subject_key: bytes, progress: Progress) -> Prepared:
    """The folds and their releases, made where they are not there yet, and the cells, none of them run.

    Raises:
        SpecError: the card or a system is wrong; the folder holds another benchmark.
        DataError: the raw export is bad; folds of different exports; a subject of a fold in its training.
    """
    card, store = load_card(job.card), open_store(out)
    export = folds.Export(card, raw, job.missing_from_start)
    plan = folds.make_plan(export, _identity(job, card, subject_key), job.folds, job.fold_seed, store)
    releases = []
    for number in range(job.folds):
        releases.append(folds.fold_release(export, plan, number, store, subject_key))
        progress.fold(number + 1, job.folds)
        _check_baselines(job, releases[0])
    # Before anything is trained: what was paid for must be of use.
    folds.all_uids(releases)
    for release, fold in zip(releases, plan.folds, strict=True):
        folds.check_fold(release, fold)
    for condition in job.conditions.values():
        condition.cases(releases[0].schema)
    return Prepared(job, card, store, plan, tuple(releases), cells_of(job, releases, store.url))


def cells_of(job: BenchJob, releases: Sequence[Release], out: str) -> tuple[Cell, ...]:
    """Every cell: seed by seed, so that a first table is there soonest; baselines have one seed."""
    works: list[tuple[str, FinetuneJob | BaselineConfig, tuple[int, ...]]]
    works = [(name, work, job.seeds) for name, work in job.jobs(job.name).items()]
    works += [(baseline.name, baseline, (0,)) for baseline in job.baselines]
    seeds = dict.fromkeys(seed for _, _, own in works for seed in own)
    folder = f"{out.rstrip('/')}/{CELLS}"
    return tuple(
        Cell(name, number, seed, work, release.pinned_url, job.passes, job.batch_size, folder, tuple(job.conditions.items()))
        for seed in seeds
        for name, work, own in works
        if seed in own
        for number, release in enumerate(releases)
    )


def run_bench(prepared: Prepared, executor: Executor, progress: Progress, truth: Truth | None = None) -> Bench:
    """Runs what is not finished, then writes bench.json and results.md. Finished cells are only read.

    truth: uid -> planted truth, for synthetic data; regret is reported then.

    Raises:
        DrafError: cells that failed, all of them in one message, after all others have been finished.
        InterruptedRunError: it was asked to stop; the same command goes on.
        SpecError: truth, where more is missing the sicker a study is: what is missing would have to be part of the posterior.
    """
    if truth is not None and prepared.job.missing_from_start is not None:
        remedy = "Leave --truth or missing_from_start out."
        raise SpecError(explain("--truth", expected="absence that says nothing", found="missing_from_start", remedy=remedy))
    _run_cells(prepared, executor, progress)
    progress.scoring()
    found = score(prepared, truth)
    prepared.store.write(RESULT, found.model_dump_json(indent=1).encode() + b"\n")
    prepared.store.write(REPORT, markdown(found).encode())
    return found


def score(prepared: Prepared, truth: Truth | None = None) -> Bench:
    """The table of a benchmark whose cells are all finished.

    Raises:
        DataError: a study that is not predicted exactly once, or by a model that may have seen its subject.
    """
    job = prepared.job
    found = [(cell, result_of(cell)) for cell in prepared.cells]
    pooled = _pool(prepared, found)
    reference = pooled[job.reference][0]
    subject = subject_numbers(prepared.releases[0], reference)
    resamples = Resamples(subject, replicates=job.bootstrap, seed=job.bootstrap_seed)
    replicates = replicate(pooled, resamples)
    rows = [_row(name, pooled, replicates, [pair for pair in found if pair[0].system == name], job) for name in job.names]
    about, conditions = _about(prepared, reference, resamples.num_subjects), _conditions(prepared, found, resamples, truth)
    return Bench(about=about, rows=tuple(rows), conditions=conditions)


def _check_baselines(job: BenchJob, release: Release) -> None:
    task = task_asked(release.schema.label, where="draf bench")
    images = [spec.name for spec in release.schema.modalities if isinstance(spec, ImageSpec)]
    if job.baselines and images:
        found, remedy = f"images ({', '.join(images)})", "Leave `baselines` empty for data with images."
        raise SpecError(explain("baselines", expected="tables and series only", found=found, remedy=remedy))
    for baseline in job.baselines:
        if isinstance(baseline, CoxRegressionConfig):
            check_cox(baseline, release.schema)
        elif task != "class":
            remedy = "Take `{kind: cox_regression}` for times." if task == "survival" else "Leave `baselines` empty."
            expected = "what predicts times" if task == "survival" else "none for several labels"
            raise SpecError(explain("baselines", expected=expected, found=baseline.kind, remedy=remedy))


def _identity(job: BenchJob, card: AnyCard, subject_key: bytes) -> str:
    return folds.identity_of(card, job.missing_from_start, job.folds, job.fold_seed, subject_key)


def _run_cells(prepared: Prepared, executor: Executor, progress: Progress) -> None:
    cells = prepared.cells
    waiting = [cell for cell in cells if not is_finished(cell)]
    finished, failures = len(cells) - len(waiting), []
    for outcome in executor.map(run_cell, waiting):
        cell = waiting[outcome.index]
        if isinstance(outcome, Done):
            finished += 1
            progress.cell(cell, outcome.value, finished, len(cells))
        else:
            failures.append((cell, outcome))
            progress.failed(cell, outcome.message)
    if failures:
        raise _all_failures(failures, finished, len(cells))


class _Traces(Exception):  # noqa: N818
    """The tracebacks of other processes, shown with --debug as the cause of the error."""


def _all_failures(failures: Sequence[tuple[Cell, Failed]], finished: int, total: int) -> DrafError:
    lines = [f"{cell.name}: {failed.message}" for cell, failed in sorted(failures, key=lambda pair: pair[1].index)]
    last = f"{finished} of {total} cells are finished, {len(failures)} failed. The same command tries these again."
    error = DrafError(together([*lines, last]))
    error.__cause__ = _Traces("\n".join(failed.trace for _, failed in failures))
    return error


def result_of(cell: Cell) -> CellResult:
    """Of a cell that is finished."""
    found = read_result(open_store(cell.url), cell)
    assert found is not None
    return found


def _pool(prepared: Prepared, found: Sequence[Finished]) -> dict[str, tuple[Pooled, ...]]:
    """System -> out-of-fold predictions of every seed."""
    counted = Counted.of(prepared)
    return {
        system: tuple(counted.pool(pairs, [fold_predictions(cell) for cell, _ in pairs]) for pairs in seeds)
        for system, seeds in _by_seed(found).items()
    }


def _by_seed(found: Sequence[Finished]) -> dict[str, list[list[Finished]]]:
    """System -> by seed, the cells of all folds, in the order of prepared.cells."""
    groups: dict[str, dict[int, list[Finished]]] = defaultdict(lambda: defaultdict(list))
    for cell, result in found:
        groups[cell.system][cell.seed].append((cell, result))
    return {system: list(seeds.values()) for system, seeds in groups.items()}


@dataclass(frozen=True)
class Counted:
    """The studies that each fold counts, and all of them; follow_ups: of the training subjects of each, of times alone."""

    own: tuple[Rows, ...]
    everything: Rows
    follow_ups: tuple[FollowUp | None, ...]

    @classmethod
    def of(cls, prepared: Prepared) -> "Counted":
        """Of a benchmark."""
        pairs = zip(prepared.releases, prepared.plan.folds, strict=True)
        own = tuple(folds.check_fold(release, fold) for release, fold in pairs)
        return cls(own, folds.all_uids(prepared.releases), tuple(follow_ups_of(prepared.releases)))

    def pool(self, pairs: Sequence[Finished], parts: Sequence[Predictions]) -> Pooled:
        """The predictions of the cells of all folds, each scaled by its own temperature."""
        temperatures = [result.temperature.value for _, result in pairs]
        pooled = pool(parts, temperatures, self.own, everything=self.everything, follow_ups=self.follow_ups)
        return pooled.labelled()

    def exact(self, parts: Sequence[Predictions], truth: Truth) -> Floats:
        """The posterior of the same studies in the same order, (n, 2)."""
        return posterior(self.in_order(parts), truth)

    def in_order(self, parts: Sequence[Predictions]) -> Predictions:
        """The predictions of the same studies in the same order, temperature not applied."""
        kept = concatenate([part.rows(np.isin(part.uid, own)) for part, own in zip(parts, self.own, strict=True)])
        return kept.rows(np.argsort(kept.uid, kind="stable")).labelled()


def _conditions(
    prepared: Prepared, found: Sequence[Finished], resamples: Resamples, truth: Truth | None
) -> tuple[ConditionResult, ...]:
    """All systems on clean studies and under every condition; nothing where that is no more than the table of clean studies."""
    job, schema = prepared.job, prepared.releases[0].schema
    if not job.conditions and truth is None:
        return ()
    counted, seeds = Counted.of(prepared), _by_seed(found)
    comparison = Comparison(resamples, job.reference, job.bootstrap_seed)

    def compared(name: str, cases: Sequence[str], parts_of: PartsOf, known: Truth | None) -> ConditionResult:
        def read(system: str) -> list[list[Pooled]]:
            return [[counted.pool(pairs, case) for case in _by_case(pairs, parts_of)] for pairs in seeds[system]]

        first = seeds[job.reference][0]
        exact = None if known is None else counted.exact(_by_case(first, parts_of)[0], known)
        return comparison.compare(name, cases, job.names, read, exact=exact)

    results = [compared(UNCHANGED, (ALL,), lambda cell: [fold_predictions(cell)], truth)]
    for name, condition in job.conditions.items():
        cases = [applied.modality for applied in condition.cases(schema)]
        known = truth if condition.only_removes else None
        results.append(compared(name, cases, partial(condition_predictions, name=name), known))
    return tuple(results)


def _by_case(pairs: Sequence[Finished], parts_of: PartsOf) -> list[tuple[Predictions, ...]]:
    """By case, the predictions of all folds."""
    return list(zip(*(parts_of(cell) for cell, _ in pairs), strict=True))


def subject_numbers(release: Release, pooled: Pooled) -> Rows:
    """Numbers (n,) in the order of the pooled studies, equal for studies of one subject; pseudonyms stay in the release."""
    table = release.subjects()
    _, numbers = np.unique(table["subject"].to_numpy(zero_copy_only=False), return_inverse=True)
    of_uid = dict(zip(table["uid"].to_pylist(), numbers.tolist(), strict=True))
    return np.array([of_uid[int(uid)] for uid in pooled.uid])


def _row(
    name: str,
    pooled: Mapping[str, Sequence[Pooled]],
    replicates: Mapping[str, Mapping[str, Floats]],
    found: Sequence[Finished],
    job: BenchJob,
) -> Row:
    seeds = pooled[name]
    by_seed, by_fold = primary_by_seed(seeds), primary_by_fold(seeds, job.folds)
    primary = TASKS[seeds[0].task].primary
    known = [value for value in by_fold if value is not None]
    each: dict[str, Any] = {
        "by_seed": by_seed,
        "by_fold": by_fold,
        "median_fold": float(np.median(known)) if known else None,
    }
    if seeds[0].task == "survival":
        # Risks of two models are on two scales: published tables average over splits.
        each["mean_fold"] = float(np.mean(known)) if known else None
    return Row(
        system=name,
        is_baseline=name not in job.systems,
        seeds=tuple(dict.fromkeys(cell.seed for cell, _ in found)),
        metrics=metrics_of(replicates[name]),
        differences={} if name == job.reference else differences_of(replicates[name], replicates[job.reference]),
        ece_floor=floor_of(seeds, job.bootstrap_seed),
        holm={metric: p[name] for metric, p in holm_of(replicates, job.reference).items() if name in p},
        **{f"{primary}_{what}": value for what, value in each.items()},
        over_seeds=None if name == job.reference else seed_test(by_seed, primary_by_seed(pooled[job.reference])),
        temperatures=tuple(result.temperature.value for _, result in found),
        wall_s=float(np.mean([result.wall_s for _, result in found])),
    )


def _auroc_of_absence(prepared: Prepared, pooled: Pooled) -> float | None:
    """What the number of missing modalities says by itself, where they were taken from the start and there are two classes."""
    job = prepared.job
    if job.missing_from_start is None or pooled.task != "class" or pooled.probability.shape[1] != 2:
        return None
    cells = [cell for cell in prepared.cells if cell.system == job.reference][: job.folds]
    present = Counted.of(prepared).in_order([fold_predictions(cell) for cell in cells]).present.sum(1)
    return auroc(np.stack([present, -present], axis=1).astype(np.float64), pooled.label)


def _about(prepared: Prepared, pooled: Pooled, num_subjects: int) -> BenchAbout:
    job, schema = prepared.job, prepared.releases[0].schema
    return BenchAbout(
        name=job.name,
        job_sha256=fingerprint(job),
        data=prepared.card.name,
        card_sha256=prepared.card.sha256,
        label=schema.label.name,
        classes=(CENSORED, EVENT) if pooled.task == "survival" else schema.label.outputs,
        num_studies=len(pooled.uid),
        num_subjects=num_subjects,
        num_sites=sum(len(fold.sites) for fold in prepared.plan.folds),
        class_counts=pooled.counts,
        uid_sum=receipt(pooled.uid).uid_sum,
        folds=prepared.plan.folds,
        releases=tuple(release.version for release in prepared.releases),
        reference=job.reference,
        bootstrap=job.bootstrap,
        git_commit=git_commit(),
        task=pooled.task,
        missing_from_start=job.missing_from_start,
        auroc_of_absence=_auroc_of_absence(prepared, pooled),
    )
